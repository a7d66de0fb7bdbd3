// Instructions of a warp that CUDA C++ has no word for: asynchronous copies to shared memory,
// loads of matrix fragments, and matrix products on tensor cores (sm_80 and later). All 32 lanes
// call them together, but for the copies.
//
// Layouts (PTX ISA, "Matrix Fragments for mma.m16n8k16"). A 32-bit word holds two neighbouring
// halves of K, the first in the lower bits; with g = lane / 4 and t = lane % 4:
//
//   A [16 rows m, 16 columns k]   word 0: m = g,     k = 2 t + {0, 1}
//                                 word 1: m = g + 8, k = 2 t + {0, 1}
//                                 word 2: m = g,     k = 2 t + 8 + {0, 1}
//                                 word 3: m = g + 8, k = 2 t + 8 + {0, 1}
//   B [16 rows k, 8 columns n]    word 0: k = 2 t + {0, 1},     n = g
//                                 word 1: k = 2 t + 8 + {0, 1}, n = g
//   D [16 rows m, 8 columns n]    floats 0, 1: m = g,     n = 2 t + {0, 1}
//                                 floats 2, 3: m = g + 8, n = 2 t + {0, 1}
//
// Where this is not compiled by nvcc, the emulator of tests/csrc/cuda_emulator takes its place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include "tensor_core.h"
#endif

namespace fastpie::cuda {

// ---------------------------------------------------------------------------- copies

// Starts to copy 16 bytes from global to shared memory, both aligned to 16, past L1: `source_bytes`
// of them, then zeros. With 0 bytes nothing is read, but `source` must be a valid address.
__device__ __forceinline__ void copy_async_16(void* shared, const void* source, int source_bytes) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
#else
  cuda_emulator::copy_async(shared, source, 16, static_cast<std::size_t>(source_bytes));
#endif
}

// Closes the group of all copies that this thread has started since the last one.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cuda_emulator::copy_commit();
#endif
}

// Waits until at most `kPending` of this thread's latest groups are under way. Other threads see
// the bytes after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#else
  cuda_emulator::copy_wait(kPending);
#endif
}

// ---------------------------------------------------------------------------- fragments

// Four 8x8 matrices of halves from shared memory. Lane i gives the address of row i % 8 of matrix
// i / 8, 16 bytes aligned to 16; word j of lane i is elements 2 (i % 4) + {0, 1} of row i / 4 of
// matrix j.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
#else
  cuda_emulator::load_matrix_x4<false>(words, row);
#endif
}

// As above, with each matrix transposed: word j of lane i is column i / 4, rows 2 (i % 4) + {0, 1}.
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&words)[4],
                                                          const void* row) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
#else
  cuda_emulator::load_matrix_x4<true>(words, row);
#endif
}

// ---------------------------------------------------------------------------- bytes

// Four bytes chosen from the eight of (high, low), lowest first, by the four nibbles of
// `selector`: the byte itself, or 8 times the sign bit of byte n - 8.
__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                                       std::uint32_t selector) {
#ifdef __CUDACC__
  std::uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(word) : "r"(low), "r"(high), "r"(selector));
  return word;
#else
  return __byte_perm(low, high, selector);
#endif
}

// ---------------------------------------------------------------------------- products

// D += A B with fp32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_emulator::mma_16x8x16<cuda_emulator::bfloat16_to_float>(d, a, b);
#endif
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_emulator::mma_16x8x16<cuda_emulator::half_to_float>(d, a, b);
#endif
}

// D += A B with an A of 16 rows and 32 columns of which at most two of four neighbours are not zero
// (PTX ISA, "Matrix fragments for sparse mma.m16n8k32"). `a` holds those two of each four, laid out
// as the A above: its columns 2 q and 2 q + 1 come from columns 4 q to 4 q + 3. `b` has two words
// more: word i is k = 2 t + 8 i + {0, 1}, n = g. `metadata` says which two, in lanes with
// t / 2 = kSelector: those with t % 2 = 0 describe columns 0 to 15 and those with 1 columns 16 to
// 31, bits 0 to 15 for row g and bits 16 to 31 for row g + 8; of these, bits 4 i to 4 i + 3 are the
// i-th four columns: the place of the first in two bits, then that of the second, which must be
// higher.
template <int kSelector>
__device__ __forceinline__ void mma_sparse_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4],
                                                std::uint32_t metadata) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#else
  cuda_emulator::mma_sparse_16x8x32<cuda_emulator::bfloat16_to_float>(d, a, b, metadata, kSelector);
#endif
}

template <int kSelector>
__device__ __forceinline__ void mma_sparse_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4],
                                                std::uint32_t metadata) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#else
  cuda_emulator::mma_sparse_16x8x32<cuda_emulator::half_to_float>(d, a, b, metadata, kSelector);
#endif
}

}  // namespace fastpie::cuda
