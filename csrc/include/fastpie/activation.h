// The activation functions that a kernel can apply to its result.
#pragma once

#include <cstdint>

namespace fastpie {

struct Activation {
  enum Kind : std::int32_t {
    kNone = 0,
    kRelu,
    kRelu6,
    kLeakyRelu,  // x > 0 ? x : slope * x
    kHardswish,
    kSilu,
    kGelu,  // x * Phi(x)
  };
  static constexpr int kKinds = kGelu + 1;
  Kind kind = kNone;
  float slope = 0.0f;
};

}  // namespace fastpie
