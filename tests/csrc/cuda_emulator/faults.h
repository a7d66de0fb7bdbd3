// The kernels of faults.cu, and their place in `_C`.
#pragma once

#include <cstdint>
#include <string>

#include "fastpie/status.h"

namespace fastpie::cuda {

struct FaultArgs {
  const std::uint32_t* input;
  std::uint32_t* output;
  std::int64_t count;
  bool mistaken;
};

Status fault(const FaultArgs& args, const std::string& kind, void* stream);

}  // namespace fastpie::cuda
