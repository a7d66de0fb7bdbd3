// embedding_disagreement: drift, the distance of two models' embeddings after each is scaled to
// length 1 (D of PreFIQs, arXiv 2605.13396), row by row.
//
//   dense   [rows, size]           strides as in `dense_strides`
//   pruned  [levels, rows, size]   strides as in `pruned_strides`
//   out     fp32 [levels, rows] contiguous; every element is written
//
//   out = || z / max(||z||, 1e-12) - y / max(||y||, 1e-12) ||, z a row of dense and y of pruned
//
// in [0, 2]; 1e-12 is that of torch.nn.functional.normalize. Strides count elements and may be
// anything. A row with NaN or an infinity in either model gives NaN; equal rows, and rows of no
// elements, exactly 0. All arithmetic is fp64, on the GPU too: no square over- or underflows, and a
// drift of 1e-7 is told as exactly as one of 1.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct EmbeddingDisagreementArgs {
  const void* dense;
  const void* pruned;
  float* out;
  DType dtype;
  std::int64_t levels;
  std::int64_t rows;
  std::int64_t size;
  std::int64_t dense_strides[2];
  std::int64_t pruned_strides[3];
};

// Rows shorter than this are scaled by its reciprocal.
constexpr double kShortestEmbedding = 1e-12;

namespace cpu {
Status embedding_disagreement(const EmbeddingDisagreementArgs& args, int threads);
}
namespace cuda {
Status embedding_disagreement(const EmbeddingDisagreementArgs& args, void* stream);
}

}  // namespace fastpie
