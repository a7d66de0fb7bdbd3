// normalize_uint8: decoded images as a network's first layer takes them.
//
//   output[n, p, c] = (images[n, c, p] / 255 - mean[c]) / std[c]     for c < channels
//                   = 0                                              for channels <= c < padded
//
// Each operation is rounded to fp32, the result to `dtype` (to nearest even).
//
//   images  uint8, element [n, c, p] at n * image_stride + c * channel_stride + p * pixel_stride:
//   any
//           order of channels and pixels
//   mean    fp32 [channels]
//   std     fp32 [channels]
//   output  [images, pixels, padded] contiguous, of `dtype`, aligned to 16 bytes: channels last.
//   With
//           `padded` a multiple of 16 bytes a convolution reads whole vectors. Every element is
//           written; overlaps no input
//
// The output of one image must have fewer than 2^31 elements. A size of 0 does nothing. For CUDA
// alone: on the CPU the operator computes its twin.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct NormalizeUint8Args {
  const std::uint8_t* images;
  std::int64_t image_stride;
  std::int64_t channel_stride;
  std::int64_t pixel_stride;
  const float* mean;
  const float* std;
  void* output;
  DType dtype;
  std::int64_t image_count;
  std::int64_t channels;
  std::int64_t pixels;
  std::int64_t padded;
};

namespace cuda {
Status normalize_uint8(const NormalizeUint8Args& args, void* stream);
}

}  // namespace fastpie
