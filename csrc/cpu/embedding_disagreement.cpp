// CPU kernel of `embedding_disagreement`. One source, compiled once per instruction set (see
// isa.h).
//
// A row is read twice, the second time from the cache: first its length, then the distance of the
// directions. Sums run in kBlockFloats columns whatever the width of a register, and the columns
// are added in order: the same bits on every instruction set.
#include "fastpie/embedding_disagreement.h"

#include "columns.h"
#include "element.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// A row of elements, read kBlockFloats at a time.
template <typename T>
struct Row {
  const T* values;
  std::int64_t stride;
  std::int64_t size;

  // Columns [begin, begin + kBlockFloats); beyond the end 0, which adds nothing to any sum.
  Block operator[](std::int64_t begin) const {
    const T* const p = values + begin * stride;
    Block block;
    if (stride == 1 && size - begin >= kBlockFloats) {
      for (int i = 0; i < kParts; ++i) block.part[i] = part_read(p + i * kPartFloats);
      return block;
    }
    float floats[kBlockFloats];
    const std::int64_t count = size - begin < kBlockFloats ? size - begin : kBlockFloats;
    read_floats(p, stride, count, kBlockFloats - count, 0.0f, floats);
    return block_load(floats);
  }
};

// What a row is multiplied by. NaN or infinite elements make it NaN or 0, and 0 * inf is NaN.
template <typename T>
double reciprocal_length(const Row<T>& row) {
  Columns squares;
  for (std::int64_t i = 0; i < row.size; i += kBlockFloats) {
    const Block block = row[i];
    for (int part = 0; part < kParts; ++part) {
      const Doubles x = to_doubles(block.part[part]);
      squares.add(part, {x.low * x.low, x.high * x.high});
    }
  }
  const double length = __builtin_sqrt(squares.total());
  return 1.0 / (length < kShortestEmbedding ? kShortestEmbedding : length);
}

template <typename T>
double distance(const Row<T>& z, double of_z, const Row<T>& y, double of_y) {
  Columns squares;
  for (std::int64_t i = 0; i < z.size; i += kBlockFloats) {
    const Block a = z[i], b = y[i];
    for (int part = 0; part < kParts; ++part) {
      const Doubles p = to_doubles(a.part[part]), q = to_doubles(b.part[part]);
      const Vec low = p.low * of_z - q.low * of_y, high = p.high * of_z - q.high * of_y;
      squares.add(part, {low * low, high * high});
    }
  }
  return __builtin_sqrt(squares.total());
}

template <typename T>
void score_rows(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const EmbeddingDisagreementArgs*>(context);
  const T* const dense = static_cast<const T*>(args.dense);
  const T* const pruned = static_cast<const T*>(args.pruned);
  for (std::int64_t n = begin; n < end; ++n) {
    const Row<T> z{dense + n * args.dense_strides[0], args.dense_strides[1], args.size};
    const double of_z = reciprocal_length(z);
    for (std::int64_t level = 0; level < args.levels; ++level) {
      const Row<T> y{pruned + level * args.pruned_strides[0] + n * args.pruned_strides[1],
                     args.pruned_strides[2], args.size};
      args.out[level * args.rows + n] =
          static_cast<float>(distance(z, of_z, y, reciprocal_length(y)));
    }
  }
}

}  // namespace

Status embedding_disagreement(const EmbeddingDisagreementArgs& args, int threads) {
  // Shares of about 32 Ki elements: enough work to be worth a thread, small enough to share out.
  const std::int64_t elements = (args.size + 1) * (args.levels + 1);
  const std::int64_t grain = elements >= 32768 ? 1 : 32768 / elements;
  auto* const context = const_cast<EmbeddingDisagreementArgs*>(&args);
  switch (args.dtype) {
    case DType::kFloat32:
      parallel_for(args.rows, grain, threads, &score_rows<float>, context);
      break;
    case DType::kBFloat16:
      parallel_for(args.rows, grain, threads, &score_rows<BFloat16>, context);
      break;
    case DType::kFloat16:
      parallel_for(args.rows, grain, threads, &score_rows<Float16>, context);
      break;
  }
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
