// The functions that CUDA gives to device code, as far as the kernels use them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulator.h"

// ---------------------------------------------------------------------------- numbers

namespace cuda_emulator {
template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using Same = typename Identity<T>::type;  // an argument from which T is not deduced
}  // namespace cuda_emulator

inline unsigned __float_as_uint(float x) { return cuda_emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return cuda_emulator::bits_as<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x >= 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(unsigned long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(unsigned long long x) { return __builtin_ffsll(static_cast<long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = (static_cast<std::uint64_t>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xf;
    const unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
    result |= ((choice & 8) != 0 ? (byte >> 7) * 0xff : byte) << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const std::uint64_t both = (static_cast<std::uint64_t>(high) << 32) | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const std::uint64_t both = (static_cast<std::uint64_t>(high) << 32) | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

#define CUDA_EMULATOR_MIN_MAX(type)                         \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
CUDA_EMULATOR_MIN_MAX(int)
CUDA_EMULATOR_MIN_MAX(unsigned)
CUDA_EMULATOR_MIN_MAX(long)
CUDA_EMULATOR_MIN_MAX(unsigned long)
CUDA_EMULATOR_MIN_MAX(long long)
CUDA_EMULATOR_MIN_MAX(unsigned long long)
#undef CUDA_EMULATOR_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---------------------------------------------------------------------------- memory

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
  return *address;
}
template <typename T>
inline void __stcs(T* address, cuda_emulator::Same<T> value) {
  *address = value;
}
inline std::size_t __cvta_generic_to_shared(const void* address) {
  return reinterpret_cast<std::size_t>(address);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
inline T atomicExch(T* address, cuda_emulator::Same<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T>
inline T atomicAdd(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, static_cast<T>(*address + value));
}
template <typename T>
inline T atomicSub(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, static_cast<T>(*address - value));
}
template <typename T>
inline T atomicMin(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, value < *address ? value : *address);
}
template <typename T>
inline T atomicMax(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, *address < value ? value : *address);
}
template <typename T>
inline T atomicAnd(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, static_cast<T>(*address & value));
}
template <typename T>
inline T atomicOr(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, static_cast<T>(*address | value));
}
template <typename T>
inline T atomicXor(T* address, cuda_emulator::Same<T> value) {
  return atomicExch(address, static_cast<T>(*address ^ value));
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return atomicExch(address, *address >= limit ? 0u : *address + 1);
}
template <typename T>
inline T atomicCAS(T* address, cuda_emulator::Same<T> expected, cuda_emulator::Same<T> value) {
  return atomicExch(address, *address == expected ? value : *address);
}

// ---------------------------------------------------------------------------- the block

inline void __syncthreads() { cuda_emulator::barrier("__syncthreads", 0); }
inline int __syncthreads_count(int predicate) {
  return cuda_emulator::barrier("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_emulator::barrier("__syncthreads_or", predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_emulator::barrier("__syncthreads_and", predicate == 0) == 0;
}
[[noreturn]] inline void __trap() { cuda_emulator::fail("__trap"); }

// ---------------------------------------------------------------------------- the warp

namespace cuda_emulator {

inline void nothing(void* const*, unsigned) {}

template <typename T>
struct Shuffle {
  T value;
  int source;  // lane
  T result;
};

template <typename T>
void finish_shuffle(void* const operands[kWarp], unsigned mask) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    auto* const mine = static_cast<Shuffle<T>*>(operands[i]);
    if ((mask >> mine->source & 1) != 0) {
      mine->result = static_cast<const Shuffle<T>*>(operands[mine->source])->value;
    } else {  // undefined
      std::memset(static_cast<void*>(&mine->result), kPoison, sizeof(T));
    }
  }
}

template <typename T>
T shuffle(const char* what, unsigned mask, const T& value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  Shuffle<T> operand{value, source, value};
  collective(what, mask, &operand, &finish_shuffle<T>);
  return operand.result;
}

struct Vote {
  unsigned bits;
  unsigned result;
};

// The ballot of a predicate.
inline void finish_ballot(void* const operands[kWarp], unsigned mask) {
  unsigned ballot = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) != 0 && static_cast<Vote*>(operands[i])->bits != 0) ballot |= 1u << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) != 0) static_cast<Vote*>(operands[i])->result = ballot;
  }
}

inline unsigned ballot(const char* what, unsigned mask, int predicate) {
  Vote vote{predicate != 0, 0};
  collective(what, mask, &vote, &finish_ballot);
  return vote.result;
}

template <typename T>
struct Match {
  T value;
  unsigned result;
};

template <typename T>
void finish_match(void* const operands[kWarp], unsigned mask) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    auto* const mine = static_cast<Match<T>*>(operands[i]);
    for (unsigned j = 0; j < kWarp; ++j) {
      if ((mask >> j & 1) != 0 && static_cast<Match<T>*>(operands[j])->value == mine->value) {
        mine->result |= 1u << j;
      }
    }
  }
}

template <typename T>
struct Reduction {
  T value;
};

template <typename T, T (*kCombine)(T, T)>
void finish_reduction(void* const operands[kWarp], unsigned mask) {
  T total{};
  bool first = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const T value = static_cast<Reduction<T>*>(operands[i])->value;
    total = first ? value : kCombine(total, value);
    first = false;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) != 0) static_cast<Reduction<T>*>(operands[i])->value = total;
  }
}

template <typename T, T (*kCombine)(T, T)>
T reduce(const char* what, unsigned mask, T value) {
  static_assert(sizeof(T) == 4, "a warp reduces 32-bit integers");
  Reduction<T> operand{value};
  collective(what, mask, &operand, &finish_reduction<T, kCombine>);
  return operand.value;
}

template <typename T>
T plus(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <typename T>
T lower(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T higher(T a, T b) {
  return a < b ? b : a;
}
inline unsigned bit_and(unsigned a, unsigned b) { return a & b; }
inline unsigned bit_or(unsigned a, unsigned b) { return a | b; }
inline unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

}  // namespace cuda_emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulator::collective("__syncwarp", mask, nullptr, &cuda_emulator::nothing);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::lane());
  return cuda_emulator::shuffle("__shfl_sync", mask, value,
                                (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::lane());
  const int source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value,
                                source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::lane());
  const int source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value,
                                source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::lane());
  const int source = lane ^ lane_mask;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value,
                                source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__any_sync", mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_emulator::ballot("__all_sync", mask, predicate == 0) == 0;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  cuda_emulator::Match<T> operand{value, 0};
  cuda_emulator::collective("__match_any_sync", mask, &operand, &cuda_emulator::finish_match<T>);
  return operand.result;
}
template <typename T>
inline T __reduce_add_sync(unsigned mask, T value) {
  return cuda_emulator::reduce<T, &cuda_emulator::plus<T>>("__reduce_add_sync", mask, value);
}
template <typename T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return cuda_emulator::reduce<T, &cuda_emulator::lower<T>>("__reduce_min_sync", mask, value);
}
template <typename T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return cuda_emulator::reduce<T, &cuda_emulator::higher<T>>("__reduce_max_sync", mask, value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return cuda_emulator::reduce<unsigned, &cuda_emulator::bit_and>("__reduce_and_sync", mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_emulator::reduce<unsigned, &cuda_emulator::bit_or>("__reduce_or_sync", mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return cuda_emulator::reduce<unsigned, &cuda_emulator::bit_xor>("__reduce_xor_sync", mask, value);
}
