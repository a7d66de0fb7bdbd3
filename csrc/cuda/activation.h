// Activation functions, for the epilogue of a kernel. The same kinds as cpu/activation.h, and NaN
// stays NaN in each.
#pragma once

#include <cuda_runtime.h>

#include "fastpie/activation.h"

namespace fastpie::cuda {

// Unlike fminf and fmaxf, these keep a NaN in `x`.
__device__ __forceinline__ float at_least(float limit, float x) { return x < limit ? limit : x; }
__device__ __forceinline__ float at_most(float limit, float x) { return x > limit ? limit : x; }

__device__ __forceinline__ float activate(float x, const Activation& f) {
  switch (f.kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return at_least(0.0f, x);
    case Activation::kRelu6:
      return at_most(6.0f, at_least(0.0f, x));
    case Activation::kLeakyRelu:
      return x > 0.0f ? x : x * f.slope;
    case Activation::kHardswish:
      return x * at_most(6.0f, at_least(0.0f, x + 3.0f)) * (1.0f / 6.0f);
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kGelu:  // erfc keeps its digits where Phi is small
      return 0.5f * x * erfcf(-0.70710678f * x);
  }
  return x;
}

}  // namespace fastpie::cuda
