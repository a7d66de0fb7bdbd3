// CPU kernel of `pack_mask`. One source, compiled once per instruction set (see isa.h).
#include "fastpie/pack_mask.h"

#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

constexpr std::int64_t kBits = 32;

inline std::uint32_t pack_word(const std::uint8_t* codes, std::int64_t stride, std::int64_t count,
                               int level) {
  std::uint32_t word = 0;
  for (std::int64_t b = 0; b < count; ++b) {
    word |= static_cast<std::uint32_t>(codes[b * stride] > level) << b;
  }
  return word;
}

void pack_filters(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const PackMaskArgs*>(context);
  const std::int64_t words = (args.channels + kBits - 1) / kBits;
  for (std::int64_t k = begin; k < end; ++k) {
    for (std::int64_t w = 0; w < words; ++w) {
      const std::int64_t first = w * kBits;
      const std::int64_t left = args.channels - first;
      const std::int64_t count = left < kBits ? left : kBits;
      const std::uint8_t* codes = args.codes + (k * args.channels + first) * args.taps;
      std::uint32_t* out = args.words + k * args.taps * words + w;
      if (args.taps == 1 && count == kBits) {  // all constant: the compiler makes vectors of it
        *out = pack_word(codes, 1, kBits, args.level);
        continue;
      }
      for (std::int64_t t = 0; t < args.taps; ++t) {
        out[t * words] = pack_word(codes + t, args.taps, count, args.level);
      }
    }
  }
}

}  // namespace

Status pack_mask(const PackMaskArgs& args, int threads) {
  const std::int64_t weights = args.channels * args.taps;  // of one filter
  if (weights == 0) return {};
  // 64 Ki weights: enough work to be worth waking a thread for.
  parallel_for(args.filters, 1 + 65536 / weights, threads, &pack_filters,
               const_cast<PackMaskArgs*>(&args));
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
