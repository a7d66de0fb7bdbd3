// null: copies an array.
//
//   input   fp32 [count] contiguous
//   output  fp32 [count] contiguous, must not overlap `input`; every element is written
//
// Bits are kept, those of a NaN too. A count of 0 does nothing.
//
// It does nothing useful: it is the smallest operation that walks the whole road from C++ to
// Python, and the page to read before adding one (CONTRIBUTING.md, "A new operation").
//
// A contract header names pointers, sizes and strides and nothing of torch or Python, so that the
// same kernel serves any caller. `cpu` runs before it returns; `cuda` enqueues on `stream` (a
// cudaStream_t) and returns at once.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct NullArgs {
  const float* input;
  float* output;
  std::int64_t count;
};

namespace cpu {
Status null(const NullArgs& args, int threads);
}
namespace cuda {
Status null(const NullArgs& args, void* stream);
}

}  // namespace fastpie
