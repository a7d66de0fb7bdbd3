// max_pool: the maximum over shifted views, on positions (masked_conv.h).
//
//   output[g][c][p] = max over taps of input[g][c][p + tap]
//
// for every position p of every tile; positions whose bit in `valid` is not set become +0. NaN wins
// over every number. A stride takes the input apart into phases first, whose halo holds -inf.
#pragma once

#include <cstdint>

#include "fastpie/masked_conv.h"
#include "fastpie/status.h"

namespace fastpie {

struct MaxPoolArgs {
  const void* input;
  void* output;
  DType dtype;  // fp32 or bf16
  std::int64_t groups;
  std::int64_t channels;
  std::int64_t input_group, input_channel;
  std::int64_t output_group, output_channel;
  const std::int32_t* taps;  // elements
  std::int64_t tap_count;    // >= 1
  const MaskedTile* tiles;
  std::int64_t tile_count;
  const std::uint32_t* valid;  // or null
};

namespace cpu {
Status max_pool(const MaxPoolArgs& args, int threads);
}

}  // namespace fastpie
