#include <cuda_runtime.h>

#include "cuda/device.h"

namespace fastpie::cuda {

std::string toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string unusable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int device = 0; device < count; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        major >= 8) {
      return "";
    }
  }
  return "no CUDA device of compute capability 8.0 or later";
}

}  // namespace fastpie::cuda
