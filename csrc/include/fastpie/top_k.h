// top_k_update: takes a batch of scores into the running top-k, the k highest scored samples of a
// stream.
//
//   values  fp32 [k]   the state, updated in place: sorted, the highest value first and of equal
//   ids     int64 [k]  values the lowest id first; unused places, all at the end, hold -inf and -1
//   scores  fp32 [levels, count]  element (l, i) at l * level_stride + i
//   new_ids int64 [count], or null: the ids are first_id, first_id + 1, ...
//
// The value of sample i is the mean of its scores over the levels: an fp64 sum in the order of the
// levels, begun at 0 (which makes a -0 a +0), divided in fp64 and rounded to fp32. NaN and -inf
// never enter. An id may occur any number of times: each occurrence is a sample.
//
// The new state is the first k of all samples, old and new, in the total order above. So a stream
// gives the same bits however it is cut into batches, in whatever order its samples come, and on
// every device. `scores` and `new_ids` must not overlap the state. A count of 0 does nothing; k >=
// 1 and both have no upper limit (one block does all the work: see cuda/top_k.cu).
//
// On the CPU and other devices torch's stable sort does the same (python/fastpie/ops/top_k.py); the
// readable twin is python/fastpie/ops/reference.py.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct TopKUpdateArgs {
  float* values;
  std::int64_t* ids;
  const float* scores;
  const std::int64_t* new_ids;
  std::int64_t first_id;
  std::int64_t k;
  std::int64_t levels;
  std::int64_t count;
  std::int64_t level_stride;
};

namespace cuda {
Status top_k_update(const TopKUpdateArgs& args, void* stream);
}

}  // namespace fastpie
