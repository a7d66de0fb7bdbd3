// What csrc/cuda/wgmma.h calls where there is no GPU: products of a warpgroup that are computed
// when they are waited for, from what is then in the registers of A and in shared memory. D is NaN
// until then, whoever writes to it.
//
// A warp computes its own 16 rows: warps of a warpgroup wait for each other nowhere but at
// barriers.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "tensor_core.h"

namespace cuda_emulator {

struct Wgmma {
  float* d;
  const std::uint32_t* a;
  std::uint64_t b;
  unsigned columns;
};

// D of one warp while products add to it.
struct WgmmaSums {
  float* d[kWarp];
  std::vector<float> values[kWarp];
  unsigned pending = 0;
};

struct WgmmaProduct {
  const std::uint32_t* a[kWarp];
  std::uint64_t b;
  unsigned columns;
  float* sums;  // key into WarpProducts::sums
  float (*to_float)(std::uint16_t);
};

struct WarpProducts {
  std::deque<std::vector<WgmmaProduct>> groups;
  std::vector<WgmmaProduct> open_group;
  std::map<float*, WgmmaSums> sums;  // by lane 0's D
  bool fenced = false;
  std::size_t started = 0;
  std::vector<std::uint64_t> operands;  // of a warpgroup, with its first warp: those of all its B
};

// Of a warp of the block that runs.
inline WarpProducts& warp_products(unsigned warp) {
  std::shared_ptr<void>& state = warp_state(warp);
  if (state == nullptr) state = std::make_shared<WarpProducts>();
  return *static_cast<WarpProducts*>(state.get());
}

// The offset in shared memory of element `k` of row `n`: PTX ISA, "Matrix Descriptor Format" and
// the canonical layout of a K-major operand swizzled over 128 bytes.
inline std::size_t wgmma_offset(std::uint64_t descriptor, unsigned n, unsigned k) {
  const std::size_t start = (descriptor & 0x3fff) << 4;
  const std::size_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const std::size_t at = start + n / 8 * eight_rows + n % 8 * 128 + k * 2;
  return at ^ ((at >> 7 & 7) << 4);
}

__attribute__((no_sanitize("address", "undefined"))) inline void finish_product(
    WarpProducts& warp, const WgmmaProduct& product) {
  float a[16][16];
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned k = 0; k < 16; ++k) {
      const Place place = place_in_a(m, k);
      a[m][k] = product.to_float(
          static_cast<std::uint16_t>(product.a[place.lane][place.word] >> (16 * place.half)));
    }
  }
  WgmmaSums& sums = warp.sums.at(product.sums);
  for (unsigned n = 0; n < product.columns; ++n) {
    float b[16];
    for (unsigned k = 0; k < 16; ++k) {
      const std::size_t at = wgmma_offset(product.b, n, k);
      if (at + 2 > kMaxShared) fail("wgmma beyond shared memory");
      if (k % 8 == 0 && !is_fenced_for_products(at)) {
        fail("wgmma of a copy that no fence.proxy.async has followed");
      }
      std::uint16_t half;
      std::memcpy(&half, dynamic_shared + at, sizeof half);
      b[k] = product.to_float(half);
    }
    for (unsigned m = 0; m < 16; ++m) {
      const Place place = place_in_d(m, n % 8);
      float& d = sums.values[place.lane][n / 8 * 4 + place.word];
      double sum = d;  // products of two halves are exact
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[k];
      d = static_cast<float>(sum);
    }
  }
  if (--sums.pending > 0) return;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(sums.d[lane], sums.values[lane].data(), sums.values[lane].size() * sizeof(float));
  }
  warp.sums.erase(product.sums);
}

template <float (*kToFloat)(std::uint16_t)>
inline void start_wgmma(void* const operands[kWarp], unsigned) {
  const auto of = [&](unsigned lane) { return static_cast<const Wgmma*>(operands[lane]); };
  const unsigned number = warp_number();
  WarpProducts& warp = warp_products(number);
  if (!warp.fenced) fail("wgmma without wgmma.fence before it in its group");
  const std::uint64_t b = of(0)->b;
  if (b >> 62 != 1 || (b >> 49 & 7) != 0) fail("wgmma of a B that is not swizzled over 128 bytes");
  WarpProducts& first = warp_products(number / 4 * 4);  // of the warpgroup
  if (warp.started == first.operands.size()) first.operands.push_back(b);
  if (first.operands[warp.started] != b) fail("wgmma with another B than the warpgroup's");
  ++warp.started;
  const unsigned floats = of(0)->columns / 2;
  WgmmaSums& sums = warp.sums[of(0)->d];
  WgmmaProduct product{{}, b, of(0)->columns, of(0)->d, kToFloat};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (of(lane)->b != b) fail("wgmma with several Bs in a warp");
    product.a[lane] = of(lane)->a;
    if (sums.pending == 0) {
      sums.d[lane] = of(lane)->d;
      sums.values[lane].assign(of(lane)->d, of(lane)->d + floats);
    }
    std::memset(of(lane)->d, kPoison, floats * sizeof(float));
  }
  ++sums.pending;
  warp.open_group.push_back(product);
}

template <float (*kToFloat)(std::uint16_t)>
inline void wgmma(float* d, unsigned columns, const std::uint32_t* a, std::uint64_t b) {
  if (blockDim.x * blockDim.y * blockDim.z % 128 != 0) fail("wgmma without a whole warpgroup");
  Wgmma operand{d, a, b, columns};
  collective("wgmma.mma_async", 0xffffffffu, &operand, &start_wgmma<kToFloat>, true);
}

inline void wgmma_fence() {
  collective(
      "wgmma.fence", 0xffffffffu, nullptr,
      [](void* const*, unsigned) { warp_products(warp_number()).fenced = true; }, true);
}

inline void wgmma_commit() {
  const auto finish = [](void* const*, unsigned) {
    WarpProducts& warp = warp_products(warp_number());
    warp.fenced = false;
    warp.groups.push_back(std::move(warp.open_group));
    warp.open_group.clear();
  };
  collective("wgmma.commit_group", 0xffffffffu, nullptr, finish, true);
}

inline void wgmma_wait(unsigned pending_groups) {
  const auto finish = [](void* const operands[kWarp], unsigned) {
    WarpProducts& warp = warp_products(warp_number());
    while (warp.groups.size() > *static_cast<const unsigned*>(operands[0])) {
      for (const WgmmaProduct& product : warp.groups.front()) finish_product(warp, product);
      warp.groups.pop_front();
    }
  };
  collective("wgmma.wait_group", 0xffffffffu, &pending_groups, finish, true);
}

}  // namespace cuda_emulator
