// What this build and this machine can do with CUDA.
#pragma once

#include <string>

namespace fastpie::cuda {

// The toolkit that compiled the kernels, "13.0".
std::string toolkit_version();

// Empty where at least one device can run these kernels, else the reason in words.
std::string unusable_reason();

}  // namespace fastpie::cuda
