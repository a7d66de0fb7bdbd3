// CUDA kernel of `embedding_disagreement`. The same name and contract as
// cpu/embedding_disagreement.cpp.
//
// A block scores a row at all levels. It reads it twice, the second time from L1 or L2. Memory
// binds also with fp64 arithmetic, on the GPUs that are good at that.
#include <cuda_runtime.h>

#include "cuda/element.h"
#include "fastpie/embedding_disagreement.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 8;
constexpr int kPerThread = 8;      // elements, in the shortest rows that take another warp
constexpr int kMaxBlocks = 65535;  // several waves of any GPU; the kernel strides over the rest

// The sum over the block, the same bits in all threads and every time.
__device__ double sum_of_block(double value, double (&scratch)[kMaxWarps]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) value += scratch[warp];
  __syncthreads();  // the scratch is free again
  return value;
}

// What a row is multiplied by. NaN or infinite elements make it NaN or 0, and 0 * inf is NaN.
template <typename T>
__device__ double reciprocal_length(const T* row, std::int64_t stride, std::int64_t size,
                                    double (&scratch)[kMaxWarps]) {
  double square = 0.0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const double x = static_cast<double>(to_float(row[i * stride]));
    square = fma(x, x, square);
  }
  const double length = sqrt(sum_of_block(square, scratch));
  return 1.0 / (length < kShortestEmbedding ? kShortestEmbedding : length);
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    embedding_disagreement_kernel(const EmbeddingDisagreementArgs args) {
  __shared__ double scratch[kMaxWarps];
  const std::int64_t stride_z = args.dense_strides[1];
  const std::int64_t stride_y = args.pruned_strides[2];
  for (std::int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const T* const z = static_cast<const T*>(args.dense) + n * args.dense_strides[0];
    const double of_z = reciprocal_length(z, stride_z, args.size, scratch);
    for (std::int64_t level = 0; level < args.levels; ++level) {
      const T* const y = static_cast<const T*>(args.pruned) + level * args.pruned_strides[0] +
                         n * args.pruned_strides[1];
      const double of_y = reciprocal_length(y, stride_y, args.size, scratch);
      double square = 0.0;
#pragma unroll 4
      for (std::int64_t i = threadIdx.x; i < args.size; i += blockDim.x) {
        // Products that no compiler may contract: equal rows must give exactly zero.
        const double p = __dmul_rn(static_cast<double>(to_float(z[i * stride_z])), of_z);
        const double q = __dmul_rn(static_cast<double>(to_float(y[i * stride_y])), of_y);
        square = fma(p - q, p - q, square);
      }
      const double drift = sqrt(sum_of_block(square, scratch));
      if (threadIdx.x == 0) args.out[level * args.rows + n] = static_cast<float>(drift);
    }
  }
}

template <typename T>
cudaError_t launch(const EmbeddingDisagreementArgs& args, void* stream) {
  const std::int64_t wanted = args.size / (kWarp * kPerThread);
  const std::int64_t warps = wanted < 1 ? 1 : (wanted < kMaxWarps ? wanted : kMaxWarps);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows < kMaxBlocks ? args.rows : kMaxBlocks));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarp));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, embedding_disagreement_kernel<T>, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace

Status embedding_disagreement(const EmbeddingDisagreementArgs& args, void* stream) {
  if (args.rows == 0 || args.levels == 0) return {};  // a launch of zero blocks is an error
  cudaError_t error = cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat32:
      error = launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      error = launch<BFloat16Bits>(args, stream);
      break;
    case DType::kFloat16:
      error = launch<__half>(args, stream);
      break;
  }
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
