// max_pool: the maximum over windows, on positions (masked_conv.h), with a stride.
//
//   output[g][c][z][y][x][i] = max over (kz, ky, kx) of
//       input[g][c][z * stride_z + kz * dilation_z - padding_z][...][...][i]
//
// over the window's pixels that lie inside the input. NaN wins over every number. Each side has its
// own pitches; `images` values of interleaved images lie side by side at every pixel. Only pixels
// are written: the halo of the output is left as it is. A window that lies outside the input
// altogether gives -inf.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

// An activation array: elements from one group, channel, slice and row to the next; pixels of a row
// are `images` elements apart.
struct PixelArray {
  std::int64_t group, channel, slice, row;
};

struct MaxPoolArgs {
  const void* input;
  void* output;
  DType dtype;  // fp32 or bf16
  std::int64_t groups, channels, images;
  PixelArray input_strides, output_strides;
  // Of (slices, rows, pixels).
  std::int64_t input_size[3], output_size[3];
  std::int64_t kernel[3], stride[3], padding[3], dilation[3];
};

namespace cpu {
Status max_pool(const MaxPoolArgs& args, int threads);
}

}  // namespace fastpie
