// masked_conv_nhwc: convolution with the kept weights alone, on channels-last tensors, on tensor
// cores, of one model or of two (the dense and a pruned one) in one launch.
//
//   output[m][n, p, k] = activate(scale[m][k] * sum over taps t and channels c of
//                                     weight[k, t, c] * mask[m][k, t, c]
//                                     * input[m][n, p * stride - padding + t * dilation, g(k) * C +
//                                     c]
//                                 + bias[m][k] + residual[m][n, p, k])
//
// with C = channels of one group, g(k) = k / (filters / groups), p and t in three dimensions (1
// where a convolution has fewer; a linear layer has one pixel), zeros outside the image. The sum is
// fp32.
//
// Both models share the weights, which are read once for both: `mask` removes weights, and a folded
// BatchNorm, which differs between the models, is `scale` and `bias`. The same `input` for both is
// read once as well. Equal masks, inputs, scales and biases give equal bits.
//
//   input     [images, input_size, groups * channels] contiguous, of `dtype`
//   weight    [filters, taps, channels] contiguous, of `dtype`
//   mask      [filters, taps, words] words of 32 bits, words = ceil(channels / 32): bit c % 32 of
//             word c / 32 is set where the weight is kept; bits beyond `channels` are ignored.
//             Null: all are kept
//   scale     fp32 [filters], or null: 1
//   bias      fp32 [filters], or null: 0
//   residual  as output, or null
//   output    [images, output_size, filters] contiguous, of `dtype`; overlaps no input
#pragma once

#include <cstdint>

#include "fastpie/activation.h"
#include "fastpie/status.h"

namespace fastpie {

struct MaskedConvNhwcModel {
  const void* input;
  const std::uint32_t* mask;
  const float* scale;
  const float* bias;
  const void* residual;
  void* output;
};

struct MaskedConvNhwcArgs {
  MaskedConvNhwcModel models[2];
  std::int32_t model_count;  // 1 or 2
  DType dtype;
  const void* weight;
  std::int64_t images;
  std::int64_t channels;  // of one group
  std::int64_t filters;   // of all groups
  std::int64_t groups;
  std::int64_t input_size[3];
  std::int64_t output_size[3];
  std::int64_t kernel[3];
  std::int64_t stride[3];
  std::int64_t padding[3];  // before; what lies behind follows from output_size
  std::int64_t dilation[3];
  Activation activation;
};

namespace cuda {

// How the work is cut: a thread block computes `filters` x `pixels` results of each model, in steps
// of `depth` products, with `warps` warps, and holds `stages` steps in shared memory.
struct MaskedConvNhwcTile {
  int filters, pixels, depth, warps, stages;
  int shared_bytes, separate_shared_bytes;  // for one input, and for two
};
int masked_conv_nhwc_tiles();  // on the current device: Hopper has tiles of its own, the last ones
MaskedConvNhwcTile masked_conv_nhwc_tile(int index);  // 0 <= index < masked_conv_nhwc_tiles()

// `dtype` is bf16 or fp16. Any `tile` computes any layer; it counts for layers with more than one
// channel in a group. Layers whose `channels` are a multiple of 8, and whose inputs and weights are
// aligned to 16 bytes, are read faster; so are outputs and residuals with `filters` a multiple of 8
// (of each group, too). Fewer than 2^31 output pixels, pixels of an image, and weights.
Status masked_conv_nhwc(const MaskedConvNhwcArgs& args, int tile, void* stream);

}  // namespace cuda
}  // namespace fastpie
