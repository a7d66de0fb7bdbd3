// CPU kernel of `masked_conv_weight_gradient`. One source, compiled once per instruction set.
//
// A tile of the output gradient stays in registers while the entries of its row pass by. Rows go to
// threads, so each entry has one writer and its sum one order, whatever the number of threads.
#include "block.h"
#include "fastpie/masked_conv.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxLines = 8;
#elif defined(__AVX2__)
constexpr int kMaxLines = 4;
#else
constexpr int kMaxLines = 2;
#endif

inline float sum_lanes(Part x) {
  float lanes[kPartFloats];
  part_store(lanes, x);
  for (int width = kPartFloats / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <int kLines>
void run_row(const MaskedEntry* entries, std::int64_t count, const float* input,
             const float* output_gradient, float* gradient) {
  Block line[kLines];
#pragma GCC unroll 8
  for (int r = 0; r < kLines; ++r) line[r] = block_load(output_gradient + r * kBlockFloats);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* const in = input + entries[i].offset;
    Part even{}, odd{};
#pragma GCC unroll 8
    for (int r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const Part x = part_load(in + r * kBlockFloats + p * kPartFloats);
        Part& sum = (r * kParts + p) % 2 == 0 ? even : odd;
        sum = part_fma(line[r].part[p], x, sum);
      }
    }
    gradient[i] += sum_lanes(even + odd);
  }
}

void run_rows(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const MaskedConvWeightGradientArgs*>(context);
  const MaskedConvArgs& f = args.forward;
  for (std::int64_t group = 0; group < f.groups; ++group) {
    for (std::int64_t t = 0; t < f.tile_count; ++t) {
      for (int from = 0; from < f.tiles[t].lines; from += kMaxLines) {
        const int rest = f.tiles[t].lines - from;
        const int lines = rest < kMaxLines ? rest : kMaxLines;
        const std::int64_t position = f.tiles[t].position + from * kBlockFloats;
        const float* const input =
            static_cast<const float*>(f.input) + group * f.input_group + position;
        for (std::int64_t i = begin; i < end; ++i) {
          const MaskedRow& row = f.rows[i];
          const float* const dy = args.output_gradient + group * f.output_group +
                                  row.channel * f.output_channel + position;
          const MaskedEntry* const entries = f.entries + row.begin;
          float* const out = args.gradient + row.begin;
          switch (lines) {
#define FASTPIE_LINES(n)                                                   \
  case n:                                                                  \
    run_row<(n <= kMaxLines ? n : 1)>(entries, row.count, input, dy, out); \
    break;
            FASTPIE_LINES(1)
            FASTPIE_LINES(2)
            FASTPIE_LINES(3)
            FASTPIE_LINES(4)
            FASTPIE_LINES(5)
            FASTPIE_LINES(6)
            FASTPIE_LINES(7)
            FASTPIE_LINES(8)
#undef FASTPIE_LINES
          }
        }
      }
    }
  }
}

}  // namespace

Status masked_conv_weight_gradient(const MaskedConvWeightGradientArgs& args, int threads) {
  if (args.forward.dtype != DType::kFloat32) return {"Expected dtype to be fp32"};
  if (args.forward.blocks != 1) return {"Expected weights packed in one block"};
  // Small shares: rows differ in length, and the threads take what is left.
  const std::int64_t rows = args.forward.chunk_channels[args.forward.chunks];
  const std::int64_t grain = (rows + 8 * threads - 1) / (8 * threads);
  parallel_for(rows, grain, threads, &run_rows, const_cast<MaskedConvWeightGradientArgs*>(&args));
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
