// CUDA kernel of `null`. The same name and contract as cpu/null.cpp.
#include <cuda_runtime.h>

#include "fastpie/null.h"

namespace fastpie::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void null_kernel(NullArgs args) {
  // A grid-stride loop: any count, one launch.
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < args.count; i += step) {
    args.output[i] = args.input[i];
  }
}

}  // namespace

Status null(const NullArgs& args, void* stream) {
  if (args.count == 0) return {};  // a launch of zero blocks is an error
  const std::int64_t wanted = (args.count + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 65535 ? wanted : 65535);
  null_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
