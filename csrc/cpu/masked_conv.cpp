// CPU kernel of `masked_conv`. One source, compiled once per instruction set (see isa.h).
//
// Per kept weight: broadcast it once, then one fused multiply-add per line of the tile with the
// activation as memory operand. What binds is the way from L2 to L1 (half a line per cycle on Zen
// 4); blocks of input channels keep a tile in L1 and bf16 halves the bytes. Fraction of the fp32
// peak reached on one core of Zen 4 at 90 % sparsity: 1x1 layers of ResNet-50 .55 to .65, 3x3 .55
// to .62; bf16 .8 to 1.0 (docs/design/cpu-engine.md).
#include "fastpie/masked_conv.h"

#include "activation.h"
#include "block.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// Lines that one pass keeps in registers beside the weight: 14 of 32 registers would do for fp32
// with room to spare, bf16 needs two per line.
#if defined(__AVX512F__)
constexpr int kMaxLines = 14;
constexpr int kMaxLinesBf16 = 14;
#elif defined(__AVX2__)
constexpr int kMaxLines = 6;
constexpr int kMaxLinesBf16 = 3;
#else
constexpr int kMaxLines = 3;
constexpr int kMaxLinesBf16 = 1;
#endif

// The rows of one block of input channels, and where their tile lies.
template <typename T>
struct Work {
  const MaskedEntry* entries;
  const MaskedRow* rows;
  std::int64_t count;
  const T* input;
  T* output;
  const T* residual;
  const std::uint32_t* valid;
};

// ---------------------------------------------------------------------------- fp32

// What a block of input channels is to the sums: they start from the bias or go on from the output,
// and end as partial sums or with the epilogue.
enum class Stage { kOnly, kFirst, kMiddle, kLast };

// Arguments are copied to locals first: the compiler could not know that a store leaves them alone.
template <int kLines, Stage kPart>
void run_rows(const MaskedConvArgs& args, const Work<float>& work) {
  constexpr bool kFromBias = kPart == Stage::kOnly || kPart == Stage::kFirst;
  constexpr bool kFinishes = kPart == Stage::kOnly || kPart == Stage::kLast;
  const MaskedEntry* const entries = work.entries;
  const MaskedRow* row = work.rows;
  const MaskedRow* const last_row = row + work.count;
  const float* const input = work.input;
  float* const output = work.output;
  const float* const residual = work.residual;
  const std::uint32_t* const valid = work.valid;
  const float* const bias = args.bias;
  const std::int64_t output_channel = args.output_channel;
  const std::int64_t residual_channel = args.residual_channel;
  const Activation activation = args.activation;
  for (; row < last_row; ++row) {
    const std::int64_t channel = row->channel;
    float* const out = output + channel * output_channel;
    Block sum[kLines];
    if (kFromBias) {
      const Block start = block_splat(bias == nullptr ? 0.0f : bias[channel]);
#pragma GCC unroll 16
      for (int r = 0; r < kLines; ++r) sum[r] = start;
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kLines; ++r) sum[r] = block_load(out + r * kBlockFloats);
    }
    const MaskedEntry* entry = entries + row->begin;
    const MaskedEntry* const end = entry + row->count;
    for (; entry < end; ++entry) {
      const float* const in = input + entry->offset;
      const Part weight = part_splat(entry->value);
#pragma GCC unroll 16
      for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          sum[r].part[p] =
              part_fma(weight, part_load(in + r * kBlockFloats + p * kPartFloats), sum[r].part[p]);
        }
      }
    }
    if (kFinishes) {
      if (residual != nullptr) {
        const float* const add = residual + channel * residual_channel;
#pragma GCC unroll 16
        for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) {
            sum[r].part[p] += part_load(add + r * kBlockFloats + p * kPartFloats);
          }
        }
      }
      if (activation.kind == Activation::kRelu) {
#pragma GCC unroll 16
        for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) sum[r].part[p] = part_max(Part{}, sum[r].part[p]);
        }
      } else if (activation.kind != Activation::kNone) {
        for (int r = 0; r < kLines; ++r) {
          for (int p = 0; p < kParts; ++p) {
            sum[r].part[p] = part_activate(sum[r].part[p], activation);
          }
        }
      }
      if (valid != nullptr) {
#pragma GCC unroll 16
        for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) {
            sum[r].part[p] = part_keep(sum[r].part[p], valid[r], p);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLines; ++r) block_store(out + r * kBlockFloats, sum[r]);
  }
}

template <int kLines>
void run_tile(const MaskedConvArgs& args, const Work<float>& work, bool first, bool last) {
  if (first && last) return run_rows<kLines, Stage::kOnly>(args, work);
  if (first) return run_rows<kLines, Stage::kFirst>(args, work);
  if (last) return run_rows<kLines, Stage::kLast>(args, work);
  run_rows<kLines, Stage::kMiddle>(args, work);
}

// ---------------------------------------------------------------------------- bf16

// sum += weight * activation for the two halves of a line. AVX-512's dot product of pairs takes
// the halves apart for nothing: (weight, 0) sees the even places, (0, weight) the odd ones.
struct Weight {
#if defined(__AVX512BF16__)
  __m512i even, odd;
#else
  Part value;
#endif
};

inline Weight broadcast_weight(float value) {
#if defined(__AVX512BF16__)
  typedef std::uint32_t Unsigned __attribute__((vector_size(64)));
  const auto odd = reinterpret_cast<Unsigned>(part_splat(value));
  return {reinterpret_cast<__m512i>(odd >> 16), reinterpret_cast<__m512i>(odd)};
#else
  return {part_splat(value)};
#endif
}

inline void multiply_add(const Weight& weight, const std::uint16_t* in, int p, Pair& sum) {
  const PartBits bits = part_load_bits(in + 2 * p * kPartFloats);
#if defined(__AVX512BF16__)
  const __m512bh x = reinterpret_cast<__m512bh>(bits);
  sum.even.part[p] = _mm512_dpbf16_ps(sum.even.part[p], reinterpret_cast<__m512bh>(weight.even), x);
  sum.odd.part[p] = _mm512_dpbf16_ps(sum.odd.part[p], reinterpret_cast<__m512bh>(weight.odd), x);
#else
  sum.even.part[p] = part_fma(weight.value, part_even(bits), sum.even.part[p]);
  sum.odd.part[p] = part_fma(weight.value, part_odd(bits), sum.odd.part[p]);
#endif
}

#if defined(__AVX512BF16__)
// 0 * x is NaN where x is infinite or NaN: the dot products let such a value into the sum of the
// other half of its pair, a pixel or an image that does not read it. What the sums should be:
__attribute__((noinline, cold)) void sum_halves_apart(const MaskedEntry* begin,
                                                      const MaskedEntry* end,
                                                      const std::uint16_t* input, Block start,
                                                      int lines, Pair* sum) {
  for (int r = 0; r < lines; ++r) {
    Pair y{start, start};
    for (const MaskedEntry* entry = begin; entry < end; ++entry) {
      const Part weight = part_splat(entry->value);
      const PartBits bits = part_load_bits(input + entry->offset + 2 * r * kBlockFloats);
      y.even.part[0] = part_fma(weight, part_even(bits), y.even.part[0]);
      y.odd.part[0] = part_fma(weight, part_odd(bits), y.odd.part[0]);
    }
    sum[r] = y;
  }
}
#endif

// The 16 bits at even (or odd) places of 32.
inline std::uint32_t every_second(std::uint32_t bits) {
  bits &= 0x55555555u;
  bits = (bits | (bits >> 1)) & 0x33333333u;
  bits = (bits | (bits >> 2)) & 0x0f0f0f0fu;
  bits = (bits | (bits >> 4)) & 0x00ff00ffu;
  return (bits | (bits >> 8)) & 0x0000ffffu;
}

template <int kLines>
void run_tile(const MaskedConvArgs& args, const Work<std::uint16_t>& work, bool, bool) {
  constexpr int kLine = 2 * kBlockFloats;
  const MaskedEntry* const entries = work.entries;
  const MaskedRow* row = work.rows;
  const MaskedRow* const last_row = row + work.count;
  const std::uint16_t* const input = work.input;
  std::uint16_t* const output = work.output;
  const std::uint16_t* const residual = work.residual;
  const std::uint32_t* const valid = work.valid;
  const float* const bias = args.bias;
  const std::int64_t output_channel = args.output_channel;
  const std::int64_t residual_channel = args.residual_channel;
  const Activation activation = args.activation;
  for (; row < last_row; ++row) {
    const std::int64_t channel = row->channel;
    std::uint16_t* const out = output + channel * output_channel;
    Pair sum[kLines];
    const Block start = block_splat(bias == nullptr ? 0.0f : bias[channel]);
#pragma GCC unroll 16
    for (int r = 0; r < kLines; ++r) sum[r] = {start, start};
    const MaskedEntry* entry = entries + row->begin;
    const MaskedEntry* const end = entry + row->count;
    for (; entry < end; ++entry) {
      const std::uint16_t* const in = input + entry->offset;
      const Weight weight = broadcast_weight(entry->value);
#pragma GCC unroll 16
      for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) multiply_add(weight, in + r * kLine, p, sum[r]);
      }
    }
#if defined(__AVX512BF16__)
    __mmask16 nan = 0;
#pragma GCC unroll 16
    for (int r = 0; r < kLines; ++r) {
      nan |= _mm512_cmp_ps_mask(sum[r].even.part[0], sum[r].odd.part[0], _CMP_UNORD_Q);
    }
    if (__builtin_expect(nan != 0, 0)) {
      Pair apart[kLines];  // the address of `sum` would keep it out of the registers
      sum_halves_apart(entries + row->begin, end, input, start, kLines, apart);
#pragma GCC unroll 16
      for (int r = 0; r < kLines; ++r) sum[r] = apart[r];
    }
#endif
#pragma GCC unroll 16
    for (int r = 0; r < kLines; ++r) {
      Pair y = sum[r];
      if (residual != nullptr) {
        const Pair add = pair_load(residual + channel * residual_channel + r * kLine);
        for (int p = 0; p < kParts; ++p) {
          y.even.part[p] += add.even.part[p];
          y.odd.part[p] += add.odd.part[p];
        }
      }
      if (activation.kind != Activation::kNone) {
        for (int p = 0; p < kParts; ++p) {
          y.even.part[p] = part_activate(y.even.part[p], activation);
          y.odd.part[p] = part_activate(y.odd.part[p], activation);
        }
      }
      if (valid != nullptr && valid[r] != 0xffffffffu) {
        const std::uint32_t even = every_second(valid[r]);
        const std::uint32_t odd = every_second(valid[r] >> 1);
        for (int p = 0; p < kParts; ++p) {
          y.even.part[p] = part_keep(y.even.part[p], even, p);
          y.odd.part[p] = part_keep(y.odd.part[p], odd, p);
        }
      }
      pair_store(out + r * kLine, y);
    }
  }
}

// ---------------------------------------------------------------------------- tiles and threads

template <typename T>
using RunTile = void (*)(const MaskedConvArgs&, const Work<T>&, bool first, bool last);

constexpr int max_lines(const float*) { return kMaxLines; }
constexpr int max_lines(const std::uint16_t*) { return kMaxLinesBf16; }

template <typename T>
RunTile<T> tile_function(int lines) {
  constexpr int kMax = max_lines(static_cast<const T*>(nullptr));
  switch (lines) {
#define FASTPIE_LINES(n) \
  case n:                \
    return &run_tile<(n <= kMax ? n : 1)>;
    FASTPIE_LINES(1)
    FASTPIE_LINES(2)
    FASTPIE_LINES(3)
    FASTPIE_LINES(4)
    FASTPIE_LINES(5)
    FASTPIE_LINES(6)
    FASTPIE_LINES(7)
    FASTPIE_LINES(8)
    FASTPIE_LINES(9)
    FASTPIE_LINES(10)
    FASTPIE_LINES(11)
    FASTPIE_LINES(12)
    FASTPIE_LINES(13)
    FASTPIE_LINES(14)
#undef FASTPIE_LINES
    default:
      return nullptr;
  }
}

template <typename T>
void run_unit(const MaskedConvArgs& args, std::int64_t group, std::int64_t tile_index,
              std::int64_t chunk) {
  constexpr int kLine = 64 / sizeof(T);
  constexpr int kMax = max_lines(static_cast<const T*>(nullptr));
  const MaskedTile tile = args.tiles[tile_index];
  const std::int64_t first = args.chunk_channels[chunk];
  const std::int64_t channels = args.chunk_channels[chunk + 1] - first;
  // As even a cut as the registers allow.
  const int passes = (tile.lines + kMax - 1) / kMax;
  for (int pass = 0; pass < passes; ++pass) {
    const int from = tile.lines * pass / passes;
    const int lines = tile.lines * (pass + 1) / passes - from;
    const std::int64_t position = tile.position + static_cast<std::int64_t>(from) * kLine;
    Work<T> work{};
    work.entries = args.entries;
    work.count = channels;
    work.input = static_cast<const T*>(args.input) + group * args.input_group + position;
    work.output = static_cast<T*>(args.output) + group * args.output_group + position;
    if (args.residual != nullptr) {
      work.residual = static_cast<const T*>(args.residual) + group * args.residual_group + position;
    }
    work.valid = args.valid == nullptr ? nullptr : args.valid + position / kLine;
    const RunTile<T> run = tile_function<T>(lines);
    for (std::int64_t block = 0; block < args.blocks; ++block) {
      work.rows = args.rows + first * args.blocks + block * channels;
      run(args, work, block == 0, block == args.blocks - 1);
    }
  }
}

// Units are numbered group by group, so that a thread's share is whole images where there are
// several, and its next layer finds them in its own cache.
template <typename T>
void run_units(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const MaskedConvArgs*>(context);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t tile = unit / args.chunks;
    run_unit<T>(args, tile / args.tile_count, tile % args.tile_count, unit % args.chunks);
  }
}

template <typename T>
void run_groups(std::int64_t begin, std::int64_t end, void* context) {
  const auto& chain = *static_cast<const MaskedConvChainArgs*>(context);
  const std::int64_t tiles = chain.layers[0].tile_count;
  std::int64_t longest = 0;
  for (std::int64_t k = 0; k < chain.count; ++k) {
    if (chain.lags[k] > longest) longest = chain.lags[k];
  }
  for (std::int64_t group = begin; group < end; ++group) {
    for (std::int64_t step = 0; step < tiles + longest; ++step) {
      for (std::int64_t k = 0; k < chain.count; ++k) {
        const std::int64_t tile = step - chain.lags[k];
        if (tile >= 0 && tile < tiles) run_unit<T>(chain.layers[k], group, tile, 0);
      }
    }
  }
}

}  // namespace

Status masked_conv(const MaskedConvArgs& args, int threads) {
  if (args.dtype == DType::kBFloat16 && args.blocks != 1) {
    return {"Expected weights packed in one block for bf16: partial sums are fp32"};
  }
  const std::int64_t units = args.groups * args.tile_count * args.chunks;
  void* const context = const_cast<MaskedConvArgs*>(&args);
  switch (args.dtype) {
    case DType::kFloat32:
      parallel_ranges(units, threads, &run_units<float>, context);
      return {};
    case DType::kBFloat16:
      parallel_ranges(units, threads, &run_units<std::uint16_t>, context);
      return {};
    case DType::kFloat16:
      break;
  }
  return {"Expected dtype to be fp32 or bf16"};
}

Status masked_conv_chain(const MaskedConvChainArgs& args, int threads) {
  if (args.count == 0) return {};
  const MaskedConvArgs& first = args.layers[0];
  for (std::int64_t k = 0; k < args.count; ++k) {
    const MaskedConvArgs& layer = args.layers[k];
    if (layer.dtype != first.dtype || layer.groups != first.groups || layer.tiles != first.tiles ||
        layer.tile_count != first.tile_count || layer.chunks != 1) {
      return {"Expected the layers of a chain to have one dtype, the same tiles and one chunk"};
    }
    if (layer.dtype == DType::kBFloat16 && layer.blocks != 1) {
      return {"Expected weights packed in one block for bf16: partial sums are fp32"};
    }
  }
  void* const context = const_cast<MaskedConvChainArgs*>(&args);
  switch (first.dtype) {
    case DType::kFloat32:
      parallel_ranges(first.groups, threads, &run_groups<float>, context);
      return {};
    case DType::kBFloat16:
      parallel_ranges(first.groups, threads, &run_groups<std::uint16_t>, context);
      return {};
    case DType::kFloat16:
      break;
  }
  return {"Expected dtype to be fp32 or bf16"};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
