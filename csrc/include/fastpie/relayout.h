// relayout: copies an array between two orders of its dimensions.
//
//   output[i0, ..., i6] = activate(scale[i1] * input[i0, ..., i6] + shift[i1])
//
// Seven dimensions (group of images, channel, phase, slice, row, column, image), each with a stride
// of its own on either side, in elements; fp32 and bf16 on either side, rounded to nearest even. It
// packs a tensor of torch into positions (masked_conv.h), takes it apart for a stride, and brings
// it back. `input` and `output` must not overlap; elements of `output` that no index reaches (the
// halo) are left as they are.
#pragma once

#include <cstdint>

#include "fastpie/activation.h"
#include "fastpie/status.h"

namespace fastpie {

constexpr int kRelayoutDims = 7;

struct RelayoutArgs {
  const void* input;
  void* output;
  DType input_dtype;
  DType output_dtype;
  std::int64_t sizes[kRelayoutDims];
  std::int64_t input_strides[kRelayoutDims];
  std::int64_t output_strides[kRelayoutDims];
  const float* scale;  // [sizes[1]] or null: 1
  const float* shift;  // [sizes[1]] or null: 0
  Activation activation;
};

namespace cpu {
Status relayout(const RelayoutArgs& args, int threads);
}

}  // namespace fastpie
