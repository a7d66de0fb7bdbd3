// CUDA kernel of `masked_conv_nhwc` for groups of one channel, without tensor cores: a few products
// for each result, so that reading the activations is all the work.
//
// A thread computes eight neighbouring filters of one pixel, of both models. The weights of a
// block's filters, masked, are in shared memory as fp32, some taps at a time.
#include "cuda/masked_conv_nhwc.h"

namespace fastpie::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kFilters = 64;  // of a block
constexpr int kLanes = kFilters / kVector;
constexpr int kPixels = kThreads / kLanes;
constexpr int kTaps = 32;  // in shared memory at a time: 16 KiB for two models

template <typename T, int kModels, bool kSharedInput>
__global__ void __launch_bounds__(kThreads)
    masked_conv_nhwc_depthwise_kernel(const ConvProblem p, int filter_tiles) {
  __shared__ float weights[kModels][kTaps][kFilters];
  const std::int64_t block_filter = static_cast<std::int64_t>(blockIdx.x % filter_tiles) * kFilters;
  const std::int64_t block_pixel = static_cast<std::int64_t>(blockIdx.x / filter_tiles) * kPixels;
  const int lane = static_cast<int>(threadIdx.x) % kLanes * kVector;
  const std::int64_t filter = block_filter + lane;
  const std::int64_t index = block_pixel + threadIdx.x / kLanes;
  const int count = static_cast<int>(p.filters - filter < kVector ? p.filters - filter : kVector);
  const bool exists = index < p.pixels && count > 0;
  const ConvPixel pixel(p, exists ? static_cast<int>(index) : 0);

  float sums[kModels][kVector] = {};
  for (int first = 0; first < p.taps; first += kTaps) {
    const int taps = min(kTaps, p.taps - first);
    __syncthreads();  // the taps before are read
    for (int i = static_cast<int>(threadIdx.x); i < taps * kFilters; i += kThreads) {
      const int tap = i % taps;  // neighbours in memory
      const int f = i / taps;
      if (block_filter + f >= p.filters) continue;
      const std::int64_t at = (block_filter + f) * p.taps + first + tap;
      const float weight = T::low(p.weight[at]);
#pragma unroll
      for (int m = 0; m < kModels; ++m) {
        const std::uint32_t* const mask = p.models[m].mask;
        weights[m][tap][f] = mask == nullptr || (mask[at] & 1u) != 0 ? weight : 0.0f;
      }
    }
    __syncthreads();
    if (!exists) continue;
    for (int tap = 0; tap < taps; ++tap) {
      const int t = first + tap;
      const int z = pixel.start[0] + t / (p.kernel[1] * p.kernel[2]) * p.dilation[0];
      const int y = pixel.start[1] + t / p.kernel[2] % p.kernel[1] * p.dilation[1];
      const int x = pixel.start[2] + t % p.kernel[2] * p.dilation[2];
      if (static_cast<unsigned>(z) >= static_cast<unsigned>(p.input_size[0]) ||
          static_cast<unsigned>(y) >= static_cast<unsigned>(p.input_size[1]) ||
          static_cast<unsigned>(x) >= static_cast<unsigned>(p.input_size[2])) {
        continue;
      }
      const std::int64_t from =
          pixel.image * p.image_elements +
          ((z * p.input_size[1] + y) * p.input_size[2] + x) * p.pixel_elements;
      float values[kVector];
#pragma unroll
      for (int m = 0; m < kModels; ++m) {
        if (m == 0 || !kSharedInput) {
          const auto* const input = static_cast<const std::uint16_t*>(p.models[m].input) + from;
          if (p.vector_input) {
            unpack_8<T>(*reinterpret_cast<const uint4*>(input + filter), values);
          } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              values[e] = e < count ? T::low(input[(filter + e) / p.group_filters]) : 0.0f;
            }
          }
        }
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          sums[m][e] = fmaf(weights[m][tap][lane + e], values[e], sums[m][e]);
        }
      }
    }
  }
  if (!exists) return;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    float scale[8];
    float bias[8];
    conv_scale_and_bias(p.models[m], filter, count, scale, bias);
    conv_epilogue<T>(p, p.models[m], sums[m], scale, bias, index * p.filters + filter, count);
  }
}

template <typename T, int kModels, bool kSharedInput>
Status launch(const ConvProblem& p, void* stream) {
  const std::int64_t filter_tiles = (p.filters + kFilters - 1) / kFilters;
  const std::int64_t blocks = filter_tiles * ((p.pixels + std::int64_t{kPixels} - 1) / kPixels);
  if (blocks > 0x7fffffff) return {"Expected a layer of fewer than 2^31 tiles"};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const auto kernel = masked_conv_nhwc_depthwise_kernel<T, kModels, kSharedInput>;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, static_cast<int>(filter_tiles));
  if (error == cudaSuccess) error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

template <typename T>
Status launch_models(const ConvProblem& p, int model_count, void* stream) {
  if (model_count == 1) return launch<T, 1, true>(p, stream);
  if (p.models[0].input == p.models[1].input) return launch<T, 2, true>(p, stream);
  return launch<T, 2, false>(p, stream);
}

}  // namespace

Status masked_conv_nhwc_depthwise(const ConvProblem& p, DType dtype, int model_count,
                                  void* stream) {
  return dtype == DType::kBFloat16 ? launch_models<BFloat16>(p, model_count, stream)
                                   : launch_models<Float16>(p, model_count, stream);
}

}  // namespace fastpie::cuda
