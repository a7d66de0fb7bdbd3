// CPU kernel of `max_pool`. One source, compiled once per instruction set (see isa.h).
#include "fastpie/max_pool.h"

#include "block.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

inline Part max_or_nan(Part x, Part y) {
  const PartBits y_is_nan = y != y;
  const Part larger = part_max(y, x);  // x where either is NaN
  return part_float((y_is_nan & part_bits(y)) | (~y_is_nan & part_bits(larger)));
}

inline Block line_max(const float* in, const MaxPoolArgs& args) {
  Block best = block_load(in + args.taps[0]);
  for (std::int64_t t = 1; t < args.tap_count; ++t) {
    for (int p = 0; p < kParts; ++p) {
      best.part[p] = max_or_nan(best.part[p], part_load(in + args.taps[t] + p * kPartFloats));
    }
  }
  return best;
}
inline Pair line_max(const std::uint16_t* in, const MaxPoolArgs& args) {
  Pair best = pair_load(in + args.taps[0]);
  for (std::int64_t t = 1; t < args.tap_count; ++t) {
    const Pair x = pair_load(in + args.taps[t]);
    for (int p = 0; p < kParts; ++p) {
      best.even.part[p] = max_or_nan(best.even.part[p], x.even.part[p]);
      best.odd.part[p] = max_or_nan(best.odd.part[p], x.odd.part[p]);
    }
  }
  return best;
}

inline void store(float* out, const Block& x, const std::uint32_t* valid) {
  Block y = x;
  if (valid != nullptr) {
    for (int p = 0; p < kParts; ++p) y.part[p] = part_keep(y.part[p], *valid, p);
  }
  block_store(out, y);
}
inline void store(std::uint16_t* out, const Pair& x, const std::uint32_t* valid) {
  pair_store(out, x);
  if (valid == nullptr) return;
  for (int i = 0; i < 32; ++i) {
    if ((*valid >> i & 1) == 0) out[i] = 0;
  }
}

template <typename T>
void run_channels(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const MaxPoolArgs*>(context);
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t group = unit / args.channels;
    const std::int64_t channel = unit % args.channels;
    const T* const in =
        static_cast<const T*>(args.input) + group * args.input_group + channel * args.input_channel;
    T* const out =
        static_cast<T*>(args.output) + group * args.output_group + channel * args.output_channel;
    for (std::int64_t t = 0; t < args.tile_count; ++t) {
      for (std::int32_t line = 0; line < args.tiles[t].lines; ++line) {
        const std::int64_t p = args.tiles[t].position + line * kLine;
        store(out + p, line_max(in + p, args),
              args.valid == nullptr ? nullptr : args.valid + p / kLine);
      }
    }
  }
}

}  // namespace

Status max_pool(const MaxPoolArgs& args, int threads) {
  if (args.dtype == DType::kFloat16) return {"Expected dtype to be fp32 or bf16"};
  parallel_ranges(
      args.groups * args.channels, threads,
      args.dtype == DType::kFloat32 ? &run_channels<float> : &run_channels<std::uint16_t>,
      const_cast<MaxPoolArgs*>(&args));
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
