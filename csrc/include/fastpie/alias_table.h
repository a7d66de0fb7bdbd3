// alias_table: the table by which one of n entries is drawn in proportion to its weight, in two
// steps: an entry i uniformly, then i itself with probability[i], else alias[i].
//
//   weights      fp64 [n] contiguous, finite and at least 0
//   probability  fp64 [n] contiguous, in [0, 1]; every element is written; overlaps no input
//   alias        int64 [n] contiguous, in [0, n); every element is written; i itself where
//                probability[i] is 1; overlaps no input
//
// What the table draws is exact: with p = probability, entry i comes with (p[i] + the sum of 1 -
// p[j] over the j with alias[j] == i) / n, which is weights[i] / sum(weights) to a few roundings,
// relatively, however long the table (rounding errors are carried on, not added up). An entry of
// weight 0 is never drawn: its probability is 0 and it is no one's alias. Weights are told apart
// over the range of fp64 below the largest one; what is smaller than that counts as 0.
//
// n of 0 does nothing. Fails for weights that are not finite, negative, or all 0. One thread, O(n)
// time, no memory of its own.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct AliasTableArgs {
  const double* weights;
  double* probability;
  std::int64_t* alias;
  std::int64_t count;
};

Status alias_table(const AliasTableArgs& args);

}  // namespace fastpie
