// Kernels that are right, or have the mistake that they are named for: what the emulator must tell
// apart. Each reverses blocks of kThreads words, output[i] = input[kThreads - 1 - i] in each block.
#include <cuda_runtime.h>

#include "cuda/mma.h"
#include "cuda/wgmma.h"
#include "faults.h"

namespace fastpie::cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

extern __shared__ __align__(1024) std::uint32_t dynamic[];

__global__ void missing_barrier_kernel(FaultArgs args) {
  __shared__ std::uint32_t words[kThreads];
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  words[threadIdx.x] = args.input[i];
  if (!args.mistaken) __syncthreads();
  args.output[i] = words[kThreads - 1 - threadIdx.x];
}

// The lanes of a warp exchange through shared memory, the warps by where they write.
__global__ void missing_warp_barrier_kernel(FaultArgs args) {
  __shared__ std::uint32_t words[kThreads];
  const unsigned lane = threadIdx.x % 32;
  const unsigned first = threadIdx.x - lane;
  words[threadIdx.x] = args.input[blockIdx.x * kThreads + threadIdx.x];
  if (!args.mistaken) __syncwarp();
  args.output[blockIdx.x * kThreads + kThreads - 32 - first + lane] = words[first + 31 - lane];
}

__global__ void missing_wait_kernel(FaultArgs args) {
  if (threadIdx.x < kThreads / 4) {
    copy_async_16(dynamic + 4 * threadIdx.x, args.input + blockIdx.x * kThreads + 4 * threadIdx.x,
                  16);
  }
  copy_async_commit();
  if (!args.mistaken) copy_async_wait<0>();
  __syncthreads();
  args.output[blockIdx.x * kThreads + threadIdx.x] = dynamic[kThreads - 1 - threadIdx.x];
}

// The second copy goes where the first one's words are still needed.
__global__ void early_copy_kernel(FaultArgs args) {
  const std::uint32_t* const input = args.input + blockIdx.x * kThreads;
  if (threadIdx.x < kThreads / 4) {
    copy_async_16(dynamic + 4 * threadIdx.x, input + 4 * threadIdx.x, 16);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < kThreads / 4) {
    copy_async_16(dynamic + (args.mistaken ? 0 : kThreads) + 4 * threadIdx.x, input, 16);
  }
  copy_async_commit();
  args.output[blockIdx.x * kThreads + threadIdx.x] = dynamic[kThreads - 1 - threadIdx.x];
  copy_async_wait<0>();
}

__global__ void global_overflow_kernel(FaultArgs args) {
  const unsigned first = blockIdx.x * kThreads;
  args.output[first + kThreads - 1 - threadIdx.x + (args.mistaken ? 1 : 0)] =
      args.input[first + threadIdx.x];
}

__global__ void static_overflow_kernel(FaultArgs args) {
  __shared__ std::uint32_t words[kThreads];
  std::uint32_t* const at = words + (args.mistaken ? 1 : 0);
  at[threadIdx.x] = args.input[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  args.output[blockIdx.x * kThreads + threadIdx.x] = at[kThreads - 1 - threadIdx.x];
}

__global__ void dynamic_overflow_kernel(FaultArgs args) {
  std::uint32_t* const at = dynamic + (args.mistaken ? kThreads + 1 : 0);
  at[threadIdx.x] = args.input[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  args.output[blockIdx.x * kThreads + threadIdx.x] = at[kThreads - 1 - threadIdx.x];
}

// Half of a warp waits for a shuffle with the other half, which waits for the block.
__global__ void divergence_kernel(FaultArgs args) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  std::uint32_t word = args.input[(blockIdx.x + 1) * kThreads - 1 - threadIdx.x];
  if (!args.mistaken || threadIdx.x % 32 < 16) {
    word = __shfl_xor_sync(kAllLanes, __shfl_xor_sync(kAllLanes, word, 1), 1);
  }
  __syncthreads();
  args.output[i] = word;
}

__global__ void not_in_mask_kernel(FaultArgs args) {
  const std::uint32_t word = args.input[(blockIdx.x + 1) * kThreads - 1 - threadIdx.x];
  __syncwarp(args.mistaken ? kAllLanes >> 1 : kAllLanes);
  args.output[blockIdx.x * kThreads + threadIdx.x] = word;
}

// Each thread's bytes go through a product with the identity, as fp16 numbers of A.
struct Identity {
  alignas(16) std::uint16_t rows[16][16] = {};
  constexpr Identity() {
    for (int i = 0; i < 16; ++i) rows[i][i] = 0x3c00;  // 1
  }
};
__device__ const Identity identity;
constexpr std::size_t kOperandBytes = 64 * 128;

enum class WgmmaMistake { kNoWait, kEarlyFragment, kEarlyOperand, kNoFence, kNoProxyFence };

template <WgmmaMistake kMistake>
__global__ void wgmma_kernel(FaultArgs args) {
  const auto has = [&](WgmmaMistake mistake) { return args.mistaken && kMistake == mistake; };
  const unsigned row = threadIdx.x / 2;
  const unsigned chunk = threadIdx.x % 2;
  copy_async_16(dynamic + row * 32 + (chunk ^ row % 8) * 4, identity.rows[row % 16] + 8 * chunk,
                row < 16 ? 16 : 0);
  copy_async_commit();
  copy_async_wait<0>();
  if (!has(WgmmaMistake::kNoProxyFence)) fence_for_products();
  __syncthreads();
  const std::uint32_t word = args.input[(blockIdx.x + 1) * kThreads - 1 - threadIdx.x];
  std::uint32_t a[4] = {};
  for (int i = 0; i < 4; ++i) {
    const auto number = static_cast<float>(word >> (8 * i) & 0xff);
    a[i / 2] |= std::uint32_t{__half_as_ushort(__float2half_rn(number))} << (16 * (i % 2));
  }
  float d[8][4] = {};
  if (!has(WgmmaMistake::kNoFence)) wgmma_fence();
  wgmma_fp16(d, a, wgmma_operand(dynamic));
  wgmma_commit();
  if (has(WgmmaMistake::kEarlyFragment)) a[0] = a[1] = 0;
  if (has(WgmmaMistake::kEarlyOperand)) dynamic[row * 32 + (chunk ^ row % 8) * 4] = 0;
  if (!has(WgmmaMistake::kNoWait)) wgmma_wait<0>();
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<std::uint32_t>(fmaxf(d[0][i], 0)) << (8 * i);
  args.output[blockIdx.x * kThreads + threadIdx.x] = result;
  wgmma_wait<0>();
}

}  // namespace

Status fault(const FaultArgs& args, const std::string& kind, void* stream) {
  void (*kernel)(FaultArgs) =
      kind == "missing_barrier"        ? missing_barrier_kernel
      : kind == "missing_warp_barrier" ? missing_warp_barrier_kernel
      : kind == "missing_wait"         ? missing_wait_kernel
      : kind == "early_copy"           ? early_copy_kernel
      : kind == "global_overflow"      ? global_overflow_kernel
      : kind == "static_overflow"      ? static_overflow_kernel
      : kind == "dynamic_overflow"     ? dynamic_overflow_kernel
      : kind == "divergence"           ? divergence_kernel
      : kind == "not_in_mask"          ? not_in_mask_kernel
      : kind == "wgmma_no_wait"        ? wgmma_kernel<WgmmaMistake::kNoWait>
      : kind == "wgmma_early_fragment" ? wgmma_kernel<WgmmaMistake::kEarlyFragment>
      : kind == "wgmma_early_operand"  ? wgmma_kernel<WgmmaMistake::kEarlyOperand>
      : kind == "wgmma_no_fence"       ? wgmma_kernel<WgmmaMistake::kNoFence>
      : kind == "wgmma_no_proxy_fence" ? wgmma_kernel<WgmmaMistake::kNoProxyFence>
                                       : nullptr;
  if (kernel == nullptr || args.count % kThreads != 0) {
    return {"Expected a known mistake and a multiple of 128 words"};
  }
  const std::size_t shared = kind.rfind("wgmma", 0) == 0 ? kOperandBytes : 2 * kThreads * 4;
  kernel<<<static_cast<unsigned>(args.count / kThreads), kThreads, shared,
           static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
