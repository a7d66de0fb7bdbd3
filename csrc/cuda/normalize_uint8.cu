// CUDA kernel of `normalize_uint8`: bound by memory, a thread stores 16 bytes at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "fastpie/normalize_uint8.h"

namespace fastpie::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr std::int64_t kMaxBlocksY = 65535;

__device__ __forceinline__ void round_to(float value, float* out) { *out = value; }
__device__ __forceinline__ void round_to(float value, __half* out) {
  *out = __float2half_rn(value);
}
__device__ __forceinline__ void round_to(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

// kCount neighbours of the output per thread; blockIdx.y is an image.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) normalize_uint8_kernel(NormalizeUint8Args args) {
  const auto size = static_cast<unsigned>(args.pixels * args.padded);
  const auto padded = static_cast<unsigned>(args.padded);
  const unsigned first = (blockIdx.x * kThreads + threadIdx.x) * kCount;
  if (first >= size) return;
  for (std::int64_t image = blockIdx.y; image < args.image_count; image += gridDim.y) {
    const std::uint8_t* const from = args.images + image * args.image_stride;
    std::int64_t pixel = first / padded;
    unsigned c = first % padded;
    Vector<T, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float value = 0.0f;
      if (c < args.channels) {
        const float x = from[c * args.channel_stride + pixel * args.pixel_stride];
        value = __fdiv_rn(__fsub_rn(__fdiv_rn(x, 255.0f), args.mean[c]), args.std[c]);
      }
      round_to(value, &out.values[i]);
      if (++c == padded) {
        c = 0;
        ++pixel;
      }
    }
    T* const to = static_cast<T*>(args.output) + image * size + first;
    *reinterpret_cast<Vector<T, kCount>*>(to) = out;
  }
}

template <typename T, int kCount>
void launch(const NormalizeUint8Args& args, cudaStream_t stream) {
  const std::int64_t threads = args.pixels * args.padded / kCount;
  const dim3 grid(
      static_cast<unsigned>((threads + kThreads - 1) / kThreads),
      static_cast<unsigned>(args.image_count < kMaxBlocksY ? args.image_count : kMaxBlocksY));
  normalize_uint8_kernel<T, kCount><<<grid, kThreads, 0, stream>>>(args);
}

template <typename T>
void launch(const NormalizeUint8Args& args, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  if (args.pixels * args.padded % kCount == 0) {
    launch<T, kCount>(args, stream);
  } else {  // the vectors of all images but the first would not be aligned
    launch<T, 1>(args, stream);
  }
}

}  // namespace

Status normalize_uint8(const NormalizeUint8Args& args, void* stream) {
  if (args.pixels * args.padded > INT_MAX) {
    return {"Expected the output of one image to have fewer than 2^31 elements"};
  }
  if (args.image_count * args.pixels * args.padded == 0) return {};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kBFloat16:
      launch<__nv_bfloat16>(args, on);
      break;
    case DType::kFloat16:
      launch<__half>(args, on);
      break;
    default:
      launch<float>(args, on);
  }
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
