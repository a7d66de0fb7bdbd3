// What csrc/cuda/mma.h calls where there is no GPU: copies and matrix products of a warp, by the
// layouts that are written there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuda_emulator {

// Element `row`, `column` of a fragment's matrix: which lane holds it, in which half of which word.
struct Place {
  unsigned lane, word, half;
};

inline Place place_in_a(unsigned row, unsigned column) {  // 16x16
  return {row % 8 * 4 + column % 8 / 2, row / 8 + column / 8 * 2, column % 2};
}
inline Place place_in_b(unsigned row, unsigned column) {  // 16x8, or 32x8 of a sparse product
  return {column * 4 + row % 8 / 2, row / 8, row % 2};
}
inline Place place_in_d(unsigned row, unsigned column) {  // 16x8, fp32: the word alone counts
  return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0};
}

struct Mma {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

template <float (*kToFloat)(std::uint16_t)>
__attribute__((no_sanitize("address", "undefined"))) inline void finish_mma(
    void* const operands[kWarp], unsigned) {
  const auto element = [](const std::uint32_t* words, const Place& place) {
    return kToFloat(static_cast<std::uint16_t>(words[place.word] >> (16 * place.half)));
  };
  float a[16][16];
  float b[8][16];  // transposed
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned m = 0; m < 16; ++m) {
      const Place place = place_in_a(m, k);
      a[m][k] = element(static_cast<const Mma*>(operands[place.lane])->a, place);
    }
    for (unsigned n = 0; n < 8; ++n) {
      const Place place = place_in_b(k, n);
      b[n][k] = element(static_cast<const Mma*>(operands[place.lane])->b, place);
    }
  }
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned n = 0; n < 8; ++n) {
      const Place place = place_in_d(m, n);
      float* const d = static_cast<const Mma*>(operands[place.lane])->d + place.word;
      double sum = *d;  // products of two halves are exact
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[n][k];
      *d = static_cast<float>(sum);
    }
  }
}

template <float (*kToFloat)(std::uint16_t)>
inline void mma_16x8x16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  Mma operand{d, a, b};
  collective("mma.sync", 0xffffffffu, &operand, &finish_mma<kToFloat>, true);
}

struct MmaSparse {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
  std::uint32_t metadata;
  unsigned selector;
};

template <float (*kToFloat)(std::uint16_t)>
__attribute__((no_sanitize("address", "undefined"))) inline void finish_mma_sparse(
    void* const operands[kWarp], unsigned) {
  const auto of = [&](unsigned lane) { return static_cast<const MmaSparse*>(operands[lane]); };
  const auto element = [](const std::uint32_t* words, const Place& place) {
    return kToFloat(static_cast<std::uint16_t>(words[place.word] >> (16 * place.half)));
  };
  const unsigned selector = of(0)->selector;
  float a[16][16];
  unsigned column[16][16];  // of 32, where each stored element lies
  float b[8][32];           // transposed
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned k = 0; k < 16; ++k) {
      const Place place = place_in_a(m, k);
      a[m][k] = element(of(place.lane)->a, place);
    }
    for (unsigned four = 0; four < 8; ++four) {
      const unsigned lane = m % 8 * 4 + selector * 2 + four / 4;
      const unsigned bits = of(lane)->metadata >> (m / 8 * 16 + four % 4 * 4) & 15;
      const unsigned first = bits & 3, second = bits >> 2;
      if (first >= second) fail("mma.sp with metadata that is not ordered");
      column[m][2 * four] = 4 * four + first;
      column[m][2 * four + 1] = 4 * four + second;
    }
  }
  for (unsigned k = 0; k < 32; ++k) {
    for (unsigned n = 0; n < 8; ++n) {
      const Place place = place_in_b(k, n);
      b[n][k] = element(of(place.lane)->b, place);
    }
  }
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned n = 0; n < 8; ++n) {
      const Place place = place_in_d(m, n);
      float* const d = of(place.lane)->d + place.word;
      double sum = *d;  // products of two halves are exact
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[n][column[m][k]];
      *d = static_cast<float>(sum);
    }
  }
}

template <float (*kToFloat)(std::uint16_t)>
inline void mma_sparse_16x8x32(float* d, const std::uint32_t* a, const std::uint32_t* b,
                               std::uint32_t metadata, unsigned selector) {
  MmaSparse operand{d, a, b, metadata, selector};
  collective(selector == 0 ? "mma.sp, selector 0" : "mma.sp, selector 1", 0xffffffffu, &operand,
             &finish_mma_sparse<kToFloat>, true);
}

struct LoadMatrix {
  const void* row;
  std::uint32_t* words;
};

template <bool kTransposed>
inline void finish_load_matrix_x4(void* const operands[kWarp], unsigned) {
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    for (unsigned row = 0; row < 8; ++row) {
      std::uint16_t elements[8];
      std::memcpy(elements, static_cast<const LoadMatrix*>(operands[8 * matrix + row])->row, 16);
      for (unsigned column = 0; column < 8; ++column) {
        const unsigned first = kTransposed ? column : row;
        const unsigned second = kTransposed ? row : column;
        std::uint32_t* const word =
            static_cast<const LoadMatrix*>(operands[4 * first + second / 2])->words + matrix;
        const unsigned shift = 16 * (second % 2);
        *word = (*word & ~(0xffffu << shift)) | (std::uint32_t{elements[column]} << shift);
      }
    }
  }
}

template <bool kTransposed>
inline void load_matrix_x4(std::uint32_t* words, const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix of a row that is not aligned to 16 bytes");
  }
  LoadMatrix operand{row, words};
  collective("ldmatrix", 0xffffffffu, &operand, &finish_load_matrix_x4<kTransposed>, true);
}

}  // namespace cuda_emulator
