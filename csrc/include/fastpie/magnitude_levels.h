// magnitude_levels: which weights go at each sparsity of a ladder, by magnitude, exactly.
//
// The weights of all tensors form one list: the tensors in order, each in memory order. Level l
// removes the first counts[l] of that list when it is sorted by |w|, equal magnitudes by place in
// the list. Magnitudes are compared as fp32, which holds every fp16 and bf16: -0 equals 0,
// subnormal numbers are told apart.
//
//   tensors    [tensor_count + 1] in device memory, see MagnitudeTensor
//   counts     [levels] in device memory, non-decreasing, in [0, elements]
//   levels     in [1, 255]
//   elements, tiles   of all tensors together
//   codes      uint8 [elements], in the order of the list: the first level that removes the weight,
//              `levels` where none does. Every element is written
//   nonfinite  [tensor_count]: how many weights are NaN or infinite. Every element is written.
//   Where
//              one is not 0, `codes` mean nothing
//   blocks     at most this many blocks of threads read the weights, at least 1: a few for each
//              multiprocessor. The result does not depend on it
//   workspace  magnitude_levels_workspace(levels, blocks) bytes, aligned to 8; overwritten
//
// The thresholds never leave the device: the call only enqueues. The result does not depend on the
// order in which threads run. Without elements it writes `nonfinite` alone.
//
// For CUDA alone: on the CPU `fastpie.prune` selects with NumPy, to the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

constexpr std::int64_t kMagnitudeTile = 1024;  // a tile holds weights of one tensor only
constexpr int kMagnitudeMaxLevels = 255;

// One row of the table of tensors, four int64 to the caller. The last row has no tensor: its
// `first` and `first_tile` are the totals.
struct MagnitudeTensor {
  const void* weights;      // contiguous
  std::int64_t dtype;       // a DType
  std::int64_t first;       // elements of the tensors before this one
  std::int64_t first_tile;  // tiles of the tensors before it: of each ceil(size / kMagnitudeTile)
};

struct MagnitudeLevelsArgs {
  const MagnitudeTensor* tensors;
  std::int64_t tensor_count;
  const std::int64_t* counts;
  std::int32_t levels;
  std::int64_t elements;
  std::int64_t tiles;
  std::uint8_t* codes;
  std::int64_t* nonfinite;
  std::int32_t blocks;
  void* workspace;
};

namespace cuda {
std::size_t magnitude_levels_workspace(std::int32_t levels, std::int32_t blocks);
Status magnitude_levels(const MagnitudeLevelsArgs& args, void* stream);
}  // namespace cuda

}  // namespace fastpie
