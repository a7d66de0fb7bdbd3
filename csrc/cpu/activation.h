// Activation functions on a register of floats, for the epilogue of a kernel.
#pragma once

#include "block.h"
#include "fastpie/activation.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// exp(x) for |x| <= 87, relative error below 2e-7; NaN stays NaN.
inline Part part_exp(Part x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2Hi = 0.693359375f;  // Cody-Waite split of ln 2 (Cephes)
  constexpr float kLn2Lo = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Part shifted = part_fma(x, part_splat(kLog2e), part_splat(kRound));
  const Part n = shifted - kRound;
  const Part r = part_fma(n, part_splat(-kLn2Lo), part_fma(n, part_splat(-kLn2Hi), x));
  Part y = part_splat(1.0f / 5040.0f);
  y = part_fma(y, r, part_splat(1.0f / 720.0f));
  y = part_fma(y, r, part_splat(1.0f / 120.0f));
  y = part_fma(y, r, part_splat(1.0f / 24.0f));
  y = part_fma(y, r, part_splat(1.0f / 6.0f));
  y = part_fma(y, r, part_splat(0.5f));
  y = part_fma(y, r, part_splat(1.0f));
  y = part_fma(y, r, part_splat(1.0f));
  const auto exponent = reinterpret_cast<PartWords>(shifted) << 23;  // unsigned: a NaN overflows
  const auto scaled = reinterpret_cast<PartBits>(reinterpret_cast<PartWords>(y) + exponent);
  const PartBits ordered = x == x;
  return part_float((ordered & scaled) | (~ordered & part_bits(x)));
}

inline Part part_sigmoid(Part x) {
  const Part bounded = part_max(part_splat(-87.0f), part_min(part_splat(87.0f), x));
  return 1.0f / (1.0f + part_exp(-bounded));
}

// x * Phi(x), erf by Abramowitz and Stegun 7.1.26, absolute error of erf below 1.5e-7.
inline Part part_gelu(Part x) {
  const Part z = x * 0.70710678f;
  const PartBits negative = part_bits(z) & static_cast<std::int32_t>(0x80000000u);
  const Part a = part_min(part_splat(9.0f), part_float(part_bits(z) ^ negative));
  const Part t = 1.0f / part_fma(part_splat(0.3275911f), a, part_splat(1.0f));
  Part p = part_splat(1.061405429f);
  p = part_fma(p, t, part_splat(-1.453152027f));
  p = part_fma(p, t, part_splat(1.421413741f));
  p = part_fma(p, t, part_splat(-0.284496736f));
  p = part_fma(p, t, part_splat(0.254829592f));
  const Part erf = 1.0f - p * t * part_exp(-(a * a));
  return 0.5f * x * (1.0f + part_float(part_bits(erf) | negative));
}

inline Part part_activate(Part x, const Activation& f) {
  const Part zero{};
  switch (f.kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return part_max(zero, x);
    case Activation::kRelu6:
      return part_min(part_splat(6.0f), part_max(zero, x));
    case Activation::kLeakyRelu: {
      const PartBits positive = x > zero;
      return part_float((positive & part_bits(x)) | (~positive & part_bits(x * f.slope)));
    }
    case Activation::kHardswish:
      return x * part_min(part_splat(6.0f), part_max(zero, x + 3.0f)) * (1.0f / 6.0f);
    case Activation::kSilu:  // below -87 the result is 0; x stays NaN where it is
      return part_max(part_splat(-87.0f), x) * part_sigmoid(x);
    case Activation::kGelu:
      return part_gelu(x);
  }
  return x;
}

}  // namespace
}  // namespace fastpie::cpu::FASTPIE_ISA
