// Reading logits of any element type.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace fastpie::cuda {

struct BFloat16Bits {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16Bits x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

}  // namespace fastpie::cuda
