// The two 16-bit types that kernels compute in: conversion, and products on tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/mma.h"
#include "cuda/wgmma.h"

namespace fastpie::cuda {

struct BFloat16 {
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
  static __device__ __forceinline__ float low(std::uint32_t word) {
    return __uint_as_float(word << 16);
  }
  static __device__ __forceinline__ float high(std::uint32_t word) {
    return __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
  template <int kColumns>
  static __device__ __forceinline__ void wgmma(float (&d)[kColumns][4], const std::uint32_t (&a)[4],
                                               std::uint64_t b) {
    wgmma_bf16(d, a, b);
  }
};

struct Float16 {
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
  static __device__ __forceinline__ float low(std::uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  }
  static __device__ __forceinline__ float high(std::uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]) {
    mma_fp16(d, a, b);
  }
  template <int kColumns>
  static __device__ __forceinline__ void wgmma(float (&d)[kColumns][4], const std::uint32_t (&a)[4],
                                               std::uint64_t b) {
    wgmma_fp16(d, a, b);
  }
};

// Eight neighbouring halves and their values.
template <typename T>
__device__ __forceinline__ void unpack_8(const uint4& words, float (&values)[8]) {
  const std::uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = T::low(all[i]);
    values[2 * i + 1] = T::high(all[i]);
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_8(const float (&values)[8]) {
  return {T::pack(values[0], values[1]), T::pack(values[2], values[3]),
          T::pack(values[4], values[5]), T::pack(values[6], values[7])};
}

}  // namespace fastpie::cuda
