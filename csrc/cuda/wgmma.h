// Matrix products of a warpgroup, four warps that begin at a multiple of four (compute capability
// 9.0, code for sm_90a). They go on after the instruction that starts them. All 128 threads call
// these functions together, but for the last.
//
//   D [64 filters m, N pixels n] += A [64, 16 columns k] B [16, N]
//
// Warp w has rows 16 w to 16 w + 15 of A and D, as fragments of mma.h: four words of A, and in
// d[n / 8] the floats of D for eight columns. B lies in shared memory, as `wgmma_operand` says.
//
//   wgmma_fence();                  // what was written to the registers counts
//   wgmma<bf16>(d, a, operand);     // any number of them
//   wgmma_commit();                 // they are a group
//   wgmma_wait<pending>();          // until then: d undefined; a and B must not change
//
// Where this is not compiled by nvcc, the emulator of tests/csrc/cuda_emulator takes its place.
#pragma once

#include "cuda/mma.h"

#ifndef __CUDACC__
#include "wgmma_products.h"
#endif

// Defined where there are such instructions: nvcc compiles each source for other GPUs as well.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define FASTPIE_WGMMA
#endif

namespace fastpie::cuda {

// A B whose 64 columns k of a row n are 128 bytes, one row after another from `rows` on, aligned to
// 1024 bytes; of each row, the 16 bytes of chunk i lie where chunk i ^ (n % 8) would. The 16
// columns from 16 j on are `wgmma_operand(rows) + 2 j`.
//
// PTX ISA, "Matrix Descriptor Format": the address and the bytes from eight rows to the next eight,
// in units of 16 bytes; swizzling over 128 bytes. The other offset has no meaning here.
__device__ __forceinline__ std::uint64_t wgmma_operand(const void* rows) {
#ifdef __CUDACC__
  const auto address = static_cast<std::uint64_t>(__cvta_generic_to_shared(rows));
#else
  const std::uint64_t address = cuda_emulator::shared_address(rows);
#endif
  constexpr std::uint64_t kEightRows = 8 * 128;
  constexpr std::uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | kEightRows >> 4 << 32 |
         kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#else
  cuda_emulator::wgmma_fence();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
  cuda_emulator::wgmma_commit();
#endif
}

// Waits until at most `kPending` of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#else
  cuda_emulator::wgmma_wait(kPending);
#endif
}

// Before a fence: keeps the compiler from computing `a` after it, between products.
__device__ __forceinline__ void wgmma_fragment([[maybe_unused]] std::uint32_t (&a)[4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

// After a wait: keeps the compiler from reading `d` before it.
template <int kColumns>
__device__ __forceinline__ void wgmma_results([[maybe_unused]] float (&d)[kColumns][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
#endif
}

// What this thread has written to shared memory, copies that it has waited for included, is there
// for the products of all that go through a barrier after it.
__device__ __forceinline__ void fence_for_products() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
  cuda_emulator::fence_for_products();
#endif
}

// ---------------------------------------------------------------------------- products

#ifdef __CUDACC__
// Sixteen floats of D, and the operands %0 to %31 or %63.
#define FASTPIE_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTPIE_D16(n) FASTPIE_D4(n), FASTPIE_D4(n + 1), FASTPIE_D4(n + 2), FASTPIE_D4(n + 3)
#define FASTPIE_D32(n) FASTPIE_D16(n), FASTPIE_D16(n + 4)
#define FASTPIE_32_OPERANDS                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTPIE_64_OPERANDS                                                                      \
  FASTPIE_32_OPERANDS                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// D is added to, A and B count as they are, and B lies row by row.
#define FASTPIE_WGMMA_64(types)                                                    \
  asm volatile(                                                                    \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" FASTPIE_32_OPERANDS \
      "}, "                                                                        \
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"                              \
      : FASTPIE_D32(0)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                         \
      : "memory")
#define FASTPIE_WGMMA_128(types)                                                    \
  asm volatile(                                                                     \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" FASTPIE_64_OPERANDS \
      "}, "                                                                         \
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}\n"                               \
      : FASTPIE_D32(0), FASTPIE_D32(8)                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                          \
      : "memory")
#endif

template <int kColumns>
__device__ __forceinline__ void wgmma_bf16(float (&d)[kColumns][4], const std::uint32_t (&a)[4],
                                           std::uint64_t b) {
  static_assert(kColumns == 8 || kColumns == 16, "64 or 128 columns");
#ifdef __CUDACC__
  if constexpr (kColumns == 8) {
    FASTPIE_WGMMA_64("bf16.bf16");
  } else {
    FASTPIE_WGMMA_128("bf16.bf16");
  }
#else
  cuda_emulator::wgmma<cuda_emulator::bfloat16_to_float>(&d[0][0], 8 * kColumns, a, b);
#endif
}

template <int kColumns>
__device__ __forceinline__ void wgmma_fp16(float (&d)[kColumns][4], const std::uint32_t (&a)[4],
                                           std::uint64_t b) {
  static_assert(kColumns == 8 || kColumns == 16, "64 or 128 columns");
#ifdef __CUDACC__
  if constexpr (kColumns == 8) {
    FASTPIE_WGMMA_64("f16.f16");
  } else {
    FASTPIE_WGMMA_128("f16.f16");
  }
#else
  cuda_emulator::wgmma<cuda_emulator::half_to_float>(&d[0][0], 8 * kColumns, a, b);
#endif
}

#ifdef __CUDACC__
#undef FASTPIE_D4
#undef FASTPIE_D16
#undef FASTPIE_D32
#undef FASTPIE_32_OPERANDS
#undef FASTPIE_64_OPERANDS
#undef FASTPIE_WGMMA_64
#undef FASTPIE_WGMMA_128
#endif

}  // namespace fastpie::cuda
