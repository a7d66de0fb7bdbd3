// CUDA kernel of `pack_mask`. The same name and contract as cpu/pack_mask.cpp.
#include <cuda_runtime.h>

#include "fastpie/pack_mask.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;  // lanes, and bits of a word
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxBlocks = 65535;

// A warp makes one word of every tap: a lane reads the taps of its channel, the vote is the word.
// The bytes of a warp lie together and come from L1 after the first tap. Lane t % 32 keeps the word
// of tap t, so that up to 32 words are written at once.
__global__ void __launch_bounds__(kThreads) pack_mask_kernel(PackMaskArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t words = (args.channels + kWarp - 1) / kWarp;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       i < args.filters * words; i += step) {
    const std::int64_t k = i / words;
    const std::int64_t w = i % words;
    const std::int64_t c = w * kWarp + lane;
    const std::uint8_t* codes = args.codes + (k * args.channels + c) * args.taps;
    for (std::int64_t first = 0; first < args.taps; first += kWarp) {
      const std::int64_t left = args.taps - first;
      const int count = static_cast<int>(left < kWarp ? left : kWarp);
      unsigned mine = 0;
      for (int t = 0; t < count; ++t) {
        const bool kept = c < args.channels && codes[first + t] > args.level;
        const unsigned word = __ballot_sync(kAllLanes, kept);
        if (lane == t) mine = word;
      }
      if (lane < count) args.words[(k * args.taps + first + lane) * words + w] = mine;
    }
  }
}

}  // namespace

Status pack_mask(const PackMaskArgs& args, void* stream) {
  const std::int64_t words = (args.channels + kWarp - 1) / kWarp;
  const std::int64_t wanted = (args.filters * words + kWarps - 1) / kWarps;
  if (wanted == 0 || args.taps == 0) return {};  // a launch of zero blocks is an error
  const unsigned blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  pack_mask_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
