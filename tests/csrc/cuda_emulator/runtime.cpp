// The functions of the CUDA runtime: one device, everything is done when they return.
#include <cuda_runtime.h>

#include <map>

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local const char* launch_failure = "";
std::map<const void*, std::size_t> allowed_shared;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

namespace cuda_emulator {

void allow_shared(const void* kernel, std::size_t bytes) { allowed_shared[kernel] = bytes; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  const auto allowed = allowed_shared.find(kernel);
  const std::size_t limit = allowed == allowed_shared.end() ? kDefaultShared : allowed->second;
  if (config.dynamicSmemBytes > limit) return remember(cudaErrorInvalidValue);
  const char* const failure =
      launch(config.gridDim, config.blockDim, config.dynamicSmemBytes, body);
  if (failure == nullptr) return cudaSuccess;
  launch_failure = failure;
  return remember(cudaErrorLaunchFailure);
}

}  // namespace cuda_emulator

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorNoDevice:
      return "the CUDA kernels of this build are emulated on the CPU, for tests";
    case cudaErrorLaunchFailure:
      return launch_failure;
    default:
      return "invalid argument";
  }
}

// There is no device to use in earnest, see cuda/device.cu.
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:  // few: loops over the grid go round
      *value = 4;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(cuda_emulator::kDefaultShared);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(cuda_emulator::kSmallestShared);
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 1536;
      break;
    case cudaDevAttrComputeCapabilityMajor:  // so that all kernels run
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 4 << 20;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                              std::size_t from_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  for (std::size_t row = 0; row < height; ++row) {
    cudaMemcpyAsync(static_cast<char*>(to) + row * to_pitch,
                    static_cast<const char*>(from) + row * from_pitch, width, kind, stream);
  }
  return cudaSuccess;
}
