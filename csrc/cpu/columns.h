// fp64 sums of floats in kBlockFloats columns: the same order, and so the same bits, whatever the
// width of a register.
#pragma once

#include "block.h"
#include "vec.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

static_assert(2 * kLanes == kPartFloats, "a Part is two Vec of doubles");

struct Doubles {
  Vec low;
  Vec high;
};

typedef float HalfPart __attribute__((vector_size(4 * kLanes)));

inline Vec to_double(HalfPart x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, x);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(x);  // __builtin_convertvector takes it apart there
#else
  return __builtin_convertvector(x, Vec);
#endif
}
inline Doubles to_doubles(Part x) {
  HalfPart halves[2];
  __builtin_memcpy(halves, &x, sizeof(halves));
  return {to_double(halves[0]), to_double(halves[1])};
}

struct Columns {
  Doubles sums[kParts] = {};

  // `part` of a Block: kPartFloats of the columns.
  inline void add(int part, Doubles x) {
    sums[part].low += x.low;
    sums[part].high += x.high;
  }
  inline double total() const {
    double columns[kBlockFloats];
    __builtin_memcpy(columns, sums, sizeof(columns));
    double sum = 0.0;
    for (int i = 0; i < kBlockFloats; ++i) sum += columns[i];
    return sum;
  }
};

}  // namespace
}  // namespace fastpie::cpu::FASTPIE_ISA
