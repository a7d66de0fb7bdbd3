// One cache line of floats, the unit that the convolution kernels compute with.
//
// A Block is one AVX-512 register, two AVX2 registers or four SSE2/NEON registers, so one source
// and one memory layout serve every instruction set. These kernels may use fused multiply-add: the
// order of the sums is the same on every instruction set, the last bit is not.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastpie::cpu::FASTPIE_ISA {

constexpr int kBlockFloats = 16;  // 64 bytes

#if defined(__AVX512F__)
typedef __m512 Part;
constexpr int kParts = 1;
#elif defined(__AVX2__)
typedef __m256 Part;
constexpr int kParts = 2;
#else
typedef float Part __attribute__((vector_size(16)));
constexpr int kParts = 4;
#endif
constexpr int kPartFloats = kBlockFloats / kParts;
typedef std::int32_t PartBits __attribute__((vector_size(4 * kPartFloats)));
typedef std::uint32_t PartWords __attribute__((vector_size(4 * kPartFloats)));

struct Block {
  Part part[kParts];
};

namespace {

inline Part part_load(const float* p) {
  Part x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline void part_store(float* p, Part x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline Part part_splat(float x) { return Part{} + x; }
inline PartBits part_bits(Part x) { return reinterpret_cast<PartBits>(x); }
inline Part part_float(PartBits x) { return reinterpret_cast<Part>(x); }

// w * x + y in one rounding where the instruction set has it.
inline Part part_fma(Part w, Part x, Part y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(w, x, y);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(w, x, y);
#else
  return w * x + y;
#endif
}

// The larger value; y where x or y is NaN.
inline Part part_max(Part x, Part y) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, x, y);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#else
  const PartBits larger = x > y;
  return part_float((larger & part_bits(x)) | (~larger & part_bits(y)));
#endif
}
inline Part part_min(Part x, Part y) {  // y where x or y is NaN
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, x, y);
#elif defined(__AVX2__)
  return _mm256_min_ps(x, y);
#else
  const PartBits smaller = x < y;
  return part_float((smaller & part_bits(x)) | (~smaller & part_bits(y)));
#endif
}

// Lane i of part `index` of a block is kept where bit index * kPartFloats + i is set, else +0.
inline Part part_keep(Part x, std::uint32_t bits, int index) {
#if defined(__AVX512F__)
  (void)index;
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#else
  PartBits lane;
  for (int i = 0; i < kPartFloats; ++i) lane[i] = std::int32_t{1} << (index * kPartFloats + i);
  const PartBits all = PartBits{} + static_cast<std::int32_t>(bits);
  return part_float(part_bits(x) & ((all & lane) == lane));
#endif
}

inline Block block_load(const float* p) {
  Block x;
  for (int i = 0; i < kParts; ++i) x.part[i] = part_load(p + i * kPartFloats);
  return x;
}
inline void block_store(float* p, const Block& x) {
  for (int i = 0; i < kParts; ++i) part_store(p + i * kPartFloats, x.part[i]);
}
inline Block block_splat(float x) {
  Block y;
  for (int i = 0; i < kParts; ++i) y.part[i] = part_splat(x);
  return y;
}

// ---------------------------------------------------------------------------- bf16
//
// 32 bf16 values fill a line. They are computed with as two blocks of fp32: those at even and those
// at odd places, which a shift and a mask take apart.

struct Pair {
  Block even;
  Block odd;
};

inline Part part_even(PartBits x) { return part_float(x << 16); }
inline Part part_odd(PartBits x) { return part_float(x & static_cast<std::int32_t>(0xffff0000u)); }
inline PartBits part_load_bits(const std::uint16_t* p) {
  PartBits x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

inline Pair pair_load(const std::uint16_t* p) {
  Pair x;
  for (int i = 0; i < kParts; ++i) {
    const PartBits bits = part_load_bits(p + 2 * i * kPartFloats);
    x.even.part[i] = part_even(bits);
    x.odd.part[i] = part_odd(bits);
  }
  return x;
}

// fp32 to the nearest bf16, ties to even, in the high half of each lane; NaN stays NaN.
inline PartBits part_round(Part x) {
  const auto bits = reinterpret_cast<PartWords>(x);  // unsigned: for a NaN the sum may overflow
  const auto rounded = reinterpret_cast<PartBits>(bits + 0x7fffu + ((bits >> 16) & 1u));
  const PartBits ordered = x == x;
  return (ordered & rounded) | (~ordered & 0x7fc00000);
}
inline void pair_store(std::uint16_t* p, const Pair& x) {
  for (int i = 0; i < kParts; ++i) {
    const PartBits low =
        reinterpret_cast<PartBits>(reinterpret_cast<PartWords>(part_round(x.even.part[i])) >> 16);
    const PartBits high = part_round(x.odd.part[i]) & static_cast<std::int32_t>(0xffff0000u);
    const PartBits bits = low | high;
    __builtin_memcpy(p + 2 * i * kPartFloats, &bits, sizeof(bits));
  }
}

}  // namespace
}  // namespace fastpie::cpu::FASTPIE_ISA
