// One register of doubles and the few functions of it that the scoring kernels need.
//
// Written with the vector extension of GCC and Clang, so one source becomes SSE2, AVX2, AVX-512 or
// NEON code. A vector wider than a register would be taken apart lane by lane (8x slower on AVX2).
// Contraction to fused multiply-add is off for these sources (CMakeLists.txt): every instruction
// set gives the same bits.
#pragma once

#include <cstdint>

namespace fastpie::cpu::FASTPIE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Vec __attribute__((vector_size(kLanes * 8)));
typedef std::int64_t Mask __attribute__((vector_size(kLanes * 8)));  // all ones where true

namespace {

constexpr double kInf = __builtin_inf();
constexpr double kNan = __builtin_nan("");

inline Vec splat(double x) { return Vec{} + x; }
inline Vec select(Mask mask, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((mask & reinterpret_cast<Mask>(yes)) |
                               (~mask & reinterpret_cast<Mask>(no)));
}
inline Vec vmax(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec vmin(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec vabs(Vec a) {
  return reinterpret_cast<Vec>(reinterpret_cast<Mask>(a) & std::int64_t{0x7fffffffffffffff});
}
inline Vec vsqrt(Vec a) {
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = __builtin_sqrt(a[lane]);
  return a;
}

// exp(x), relative error below 4e-16; 0 below -708 (no subnormal results), for x <= 709.
inline Vec vexp(Vec x) {
  constexpr double kLog2e = 1.4426950408889634074;
  constexpr double kLn2Hi = 6.93147180369123816490e-01;  // Cody-Waite split of ln 2 (fdlibm)
  constexpr double kLn2Lo = 1.90821492927058770002e-10;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const Mask tiny = ~(x > -708.0);               // also catches NaN, which the caller has flagged
  x = select(tiny, splat(-708.0), x);
  const Vec shifted = x * kLog2e + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * kLn2Hi) - n * kLn2Lo;
  // Taylor series: |r| <= 0.347, so the first term left out is below 1.1e-17.
  Vec y = splat(1.0 / 6227020800.0);
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  // The low bits of `shifted` hold n; moved to the exponent they multiply by 2^n.
  const Mask scaled = reinterpret_cast<Mask>(y) + (reinterpret_cast<Mask>(shifted) << 52);
  return select(tiny, Vec{}, reinterpret_cast<Vec>(scaled));
}

// log(x) for finite x >= 2^-1022, relative error below 5e-16; exactly 0 at 1.
inline Vec vlog(Vec x) {
  constexpr double kLn2Hi = 6.93147180369123816490e-01;
  constexpr double kLn2Lo = 1.90821492927058770002e-10;
  constexpr std::int64_t kMantissa = 0x000fffffffffffff;
  constexpr std::int64_t kOne = 0x3ff0000000000000;
  const Mask bits = reinterpret_cast<Mask>(x);
  Vec m = reinterpret_cast<Vec>((bits & kMantissa) | kOne);  // [1, 2)
  // The biased exponent as a double: below 2^52 an integer is the low mantissa of 2^52 + itself.
  Vec e = reinterpret_cast<Vec>(((bits >> 52) & 0x7ff) | 0x4330000000000000) - 4503599627371519.0;
  const Mask high = m > 1.4142135623730951;
  m = select(high, m * 0.5, m);
  e = select(high, e + 1.0, e);
  // log m = 2 atanh((m - 1) / (m + 1)): |s| <= 0.1716, first term left out below 3e-18.
  const Vec f = m - 1.0;
  const Vec s = f / (f + 2.0);
  const Vec z = s * s;
  Vec y = splat(1.0 / 21.0);
  y = y * z + 1.0 / 19.0;
  y = y * z + 1.0 / 17.0;
  y = y * z + 1.0 / 15.0;
  y = y * z + 1.0 / 13.0;
  y = y * z + 1.0 / 11.0;
  y = y * z + 1.0 / 9.0;
  y = y * z + 1.0 / 7.0;
  y = y * z + 1.0 / 5.0;
  y = y * z + 1.0 / 3.0;
  return e * kLn2Hi + (e * kLn2Lo + 2.0 * s * (1.0 + z * y));
}

}  // namespace
}  // namespace fastpie::cpu::FASTPIE_ISA
