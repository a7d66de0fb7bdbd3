// The result of every operation of this library, and the element types it reads.
#pragma once

#include <cstdint>

namespace fastpie {

// `message` is null on success and else a string of static storage duration.
struct Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

enum class DType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace fastpie
