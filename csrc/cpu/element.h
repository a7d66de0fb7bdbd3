// Reading logits of any element type and stride.
#pragma once

#include "block.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_float(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  std::uint32_t bits;
  if (rest >= 0x7c00u) {  // infinity and NaN
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x0400u) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {  // subnormal: rest * 2^-24, exact in fp32
    const float value = static_cast<float>(rest) * 5.9604644775390625e-08f;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bits |= sign;
  }
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Neighbours that fill a Part.
inline Part part_read(const float* p) { return part_load(p); }
inline Part part_read(const BFloat16* p) {
  typedef std::uint16_t Halves __attribute__((vector_size(2 * kPartFloats)));
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return reinterpret_cast<Part>(__builtin_convertvector(halves, PartWords) << 16);
}
inline Part part_read(const Float16* p) {
#if defined(__AVX512F__)
  __m256i halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return _mm512_maskz_cvtph_ps(0xffff, halves);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  __m128i halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return _mm256_cvtph_ps(halves);
#else
  Part x;
  for (int i = 0; i < kPartFloats; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// `count` values, `stride` elements apart, as floats; `padded` more are `fill`.
template <typename T>
void read_floats(const T* p, std::int64_t stride, std::int64_t count, std::int64_t padded,
                 float fill, float* out) {
  std::int64_t i = 0;
  if (stride == 1) {
    for (; i + kPartFloats <= count; i += kPartFloats) part_store(out + i, part_read(p + i));
  }
  for (; i < count; ++i) out[i] = to_float(p[i * stride]);
  for (; i < count + padded; ++i) out[i] = fill;
}

}  // namespace
}  // namespace fastpie::cpu::FASTPIE_ISA
