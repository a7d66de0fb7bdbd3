// What the kernels of masked_conv_nhwc share: the arguments in the sizes that the device computes
// with, and the end of the sum.
#pragma once

#include <cuda_runtime.h>

#include "cuda/activation.h"
#include "cuda/half.h"
#include "fastpie/masked_conv_nhwc.h"

namespace fastpie::cuda {

// Offsets in activations are of 64 bits, everything within one image's pixels or one filter of 32.
struct ConvProblem {
  MaskedConvNhwcModel models[2];
  const std::uint16_t* weight;
  Activation activation;
  std::int64_t image_elements;  // of an input image
  std::int64_t pixel_elements;  // of an input pixel: groups * channels
  std::int64_t filters;         // of all groups
  int channels, group_filters;
  int taps, words;  // words of the mask for each tap
  int depth;        // taps * channels
  int pixels;       // of all output images
  int input_size[3], output_size[3], kernel[3], stride[3], padding[3], dilation[3];
  bool vector_input;   // eight channels of the inputs and weights lie together, aligned
  bool vector_output;  // eight filters of the outputs and residuals, too
};

// An output pixel: where its window begins, and its image.
struct ConvPixel {
  std::int64_t image;
  int start[3];

  __device__ __forceinline__ ConvPixel(const ConvProblem& p, int pixel) {
    const unsigned width = static_cast<unsigned>(p.output_size[2]);
    const unsigned height = static_cast<unsigned>(p.output_size[1]);
    const unsigned depth = static_cast<unsigned>(p.output_size[0]);
    unsigned rest = static_cast<unsigned>(pixel);
    const unsigned x = rest % width;
    rest /= width;
    const unsigned y = rest % height;
    rest /= height;
    const unsigned z = rest % depth;
    image = rest / depth;
    start[0] = static_cast<int>(z) * p.stride[0] - p.padding[0];
    start[1] = static_cast<int>(y) * p.stride[1] - p.padding[1];
    start[2] = static_cast<int>(x) * p.stride[2] - p.padding[2];
  }
};

// Scale, bias, residual and activation of eight neighbouring filters of one pixel, of which the
// first `count` exist, and their rounding.
template <typename T>
__device__ __forceinline__ void conv_epilogue(const ConvProblem& p,
                                              const MaskedConvNhwcModel& model, float (&values)[8],
                                              const float (&scale)[8], const float (&bias)[8],
                                              std::int64_t offset, int count) {
  const auto* const residual = static_cast<const std::uint16_t*>(model.residual);
  auto* const output = static_cast<std::uint16_t*>(model.output) + offset;
  float added[8] = {};
  if (residual != nullptr) {
    if (p.vector_output) {
      unpack_8<T>(*reinterpret_cast<const uint4*>(residual + offset), added);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) added[e] = T::low(residual[offset + e]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    values[e] = fmaf(values[e], scale[e], bias[e]);
    if (residual != nullptr) values[e] += added[e];
    values[e] = activate(values[e], p.activation);
  }
  if (p.vector_output) {
    *reinterpret_cast<uint4*>(output) = pack_8<T>(values);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) output[e] = static_cast<std::uint16_t>(T::pack(values[e], 0.0f));
    }
  }
}

// Scale and bias of eight filters from `first`, of which `count` exist.
__device__ __forceinline__ void conv_scale_and_bias(const MaskedConvNhwcModel& model,
                                                    std::int64_t first, int count,
                                                    float (&scale)[8], float (&bias)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    scale[e] = model.scale != nullptr && e < count ? model.scale[first + e] : 1.0f;
    bias[e] = model.bias != nullptr && e < count ? model.bias[first + e] : 0.0f;
  }
}

// One filter for each group, or several, of one channel each: no matrix product.
Status masked_conv_nhwc_depthwise(const ConvProblem& p, DType dtype, int model_count, void* stream);

// The tiles of Hopper's tensor cores, none where the current device is of another kind. They are
// for problems with `vector_input`.
int masked_conv_nhwc_hopper_tiles();
MaskedConvNhwcTile masked_conv_nhwc_hopper_tile(int index);
Status masked_conv_nhwc_hopper(const ConvProblem& p, DType dtype, int groups, int model_count,
                               int tile, void* stream);

}  // namespace fastpie::cuda
