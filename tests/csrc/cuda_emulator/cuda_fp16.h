// Shadows the CUDA toolkit's header: half precision by integer arithmetic, rounded to nearest even.
#pragma once

#include <cuda_runtime.h>

namespace cuda_emulator {

inline float half_to_float(std::uint16_t bits) {
  const unsigned sign = static_cast<unsigned>(bits & 0x8000u) << 16;
  const unsigned exponent = bits >> 10 & 31u;
  const unsigned mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  }
  const unsigned wide = exponent == 31 ? 255u : exponent + 112u;
  return __uint_as_float(sign | wide << 23 | mantissa << 13);
}

inline std::uint16_t float_to_half(float value) {
  const unsigned bits = __float_as_uint(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;          // NaN, the one that the GPU gives
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 puts a multiple of 2^-24 last
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u));
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

}  // namespace cuda_emulator

struct __half {
  std::uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(cuda_emulator::float_to_half(value)) {}
  operator float() const { return cuda_emulator::half_to_float(bits); }
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half __ushort_as_half(unsigned short x) { return cuda_emulator::bits_as<__half>(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
