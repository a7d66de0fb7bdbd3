// disagreement: how far the logits of a pruned model are from those of its dense self, row by row,
// every score in one pass over memory.
//
//   dense   [rows, classes]           element (n, c)    at n * dense_row_stride + c
//   pruned  [levels, rows, classes]   element (l, n, c) at l * pruned_level_stride
//                                                          + n * pruned_row_stride + c
//   labels  multiclass:  int64 [rows], or null
//   targets multilabel:  fp32 [rows, classes] contiguous, 1, 0 or NaN (unknown), or null
//   out     fp32 [kScoreCount, levels, rows] contiguous; every element is written
//
// Strides count elements. A row with a NaN or +inf logit in either model gives NaN in every score
// (0 in kFlip); -inf is a class of probability zero. A constant row has no ranking: kSpearman is
// NaN. Without labels the three loss scores are NaN. A label outside [0, classes) makes the scores
// that depend on it NaN; it is never used as an index. The formulas are those of
// python/fastpie/ops/reference.py, the readable twin.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

enum class Task : std::int32_t { kMulticlass = 0, kMultilabel = 1 };

// The order of the rows of `out`.
enum Score : std::int32_t {
  kJs = 0,
  kKl,
  kKlReverse,
  kSpearman,
  kFlip,
  kMarginDense,
  kMarginPruned,
  kDrift,
  kLossDense,
  kLossPruned,
  kDamage,
  kScoreCount
};

struct DisagreementArgs {
  const void* dense;
  const void* pruned;
  const std::int64_t* labels;
  const float* targets;
  float* out;
  DType dtype;
  Task task;
  std::int64_t levels;
  std::int64_t rows;
  std::int64_t classes;
  std::int64_t dense_row_stride;
  std::int64_t pruned_level_stride;
  std::int64_t pruned_row_stride;
};

namespace cpu {
Status disagreement(const DisagreementArgs& args, int threads);
}
namespace cuda {
// classes <= kMaxClasses: the ranks of one row must fit in the shared memory of one block.
constexpr std::int64_t kMaxClasses = 16384;
Status disagreement(const DisagreementArgs& args, void* stream);
}  // namespace cuda

}  // namespace fastpie
