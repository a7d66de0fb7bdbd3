// CUDA kernels of `magnitude_levels`: a radix select of all levels at once, then the codes.
//
// The bits of |w| as fp32, without the sign, are a key that sorts as |w| does. Four passes over the
// weights find the key at each level's place, 8 bits at a time: a histogram of the next digit over
// the keys that begin like a level's threshold does so far, then the digit in which the level's
// place falls. Levels whose thresholds begin alike share a histogram (a slot). At last a level
// removes all keys below its threshold and, of those that equal it, the first few: for these every
// warp counts them in its part of the list, the counts are summed, and the warp that writes the
// codes knows how many came before.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "fastpie/magnitude_levels.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 2;  // blocks of a multiprocessor, so that nothing spills
constexpr int kNarrowMaxWarps = 32;
constexpr int kScanThreads = 1024;
constexpr int kRows = 8;  // loads of a lane in flight

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kPasses = 4;         // the highest digit has a bit less: the sign is 0
constexpr int kSlotsOfBlock = 32;  // histograms that fit 32 KiB of shared memory

constexpr unsigned kInfinity = 0x7f800000u;
constexpr unsigned kNoKey = 0xffffffffu;  // behind the end of a tensor

using Count = unsigned long long;  // what atomicAdd takes; 64 bits: any number of weights

struct Level {
  // While narrowed down: the digits so far. Then all keys below this one go.
  unsigned threshold;
  // Whose histogram it reads; then whose ties it counts. -1: none.
  int slot;
  // Its place among the keys of the slot; then how many of those equal to `threshold` go.
  std::int64_t rank;
};

struct Workspace {
  Level* levels;        // [levels]
  unsigned* slot_keys;  // [levels], ascending: with what the keys of a slot begin
  int* slots;           // how many there are
  Count* histograms;    // [kPasses, levels, kBins]
  std::int64_t* ties;   // [levels, ranges]: of a slot in each warp's range; then in those before
  std::int64_t ranges;
};

__host__ __device__ inline std::int64_t ranges_of(int blocks) {
  return static_cast<std::int64_t>(blocks) * kWarps;
}

// ---------------------------------------------------------------------------- reading weights

__device__ __forceinline__ unsigned key_of(float w) { return __float_as_uint(w) & 0x7fffffffu; }
__device__ __forceinline__ unsigned key_of(__half w) { return key_of(__half2float(w)); }
struct BFloat16 {
  std::uint16_t bits;
};
__device__ __forceinline__ unsigned key_of(BFloat16 w) {
  return (static_cast<unsigned>(w.bits) << 16) & 0x7fffffffu;
}

// Row r of the warp holds the kWarp weights from r * kWarp on.
template <typename T>
__device__ __forceinline__ void load_keys(const void* weights, std::int64_t begin, std::int64_t end,
                                          unsigned (&keys)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t i = begin + r * kWarp + lane;
    keys[r] = i < end ? key_of(static_cast<const T*>(weights)[i]) : kNoKey;
  }
}

// Calls visit(tensor, place in the list of the first row, keys) for the range of the list that is
// this warp's, in order. All lanes call it together.
template <typename Visit>
__device__ __forceinline__ void for_each_batch(const MagnitudeLevelsArgs& args,
                                               const Visit& visit) {
  const std::int64_t ranges = ranges_of(static_cast<int>(gridDim.x));
  const std::int64_t range = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const std::int64_t first = range * args.tiles / ranges;
  const std::int64_t last = (range + 1) * args.tiles / ranges;
  std::int64_t tensor = 0;  // that of the tile: the last one that begins at or before it
  for (std::int64_t above = args.tensor_count; above - tensor > 1;) {
    const std::int64_t middle = (tensor + above) / 2;
    if (args.tensors[middle].first_tile <= first) {
      tensor = middle;
    } else {
      above = middle;
    }
  }
  for (std::int64_t tile = first; tile < last; ++tile) {
    while (args.tensors[tensor + 1].first_tile <= tile) ++tensor;
    const MagnitudeTensor row = args.tensors[tensor];
    const std::int64_t size = args.tensors[tensor + 1].first - row.first;
    const std::int64_t from = (tile - row.first_tile) * kMagnitudeTile;
    const std::int64_t to = from + kMagnitudeTile < size ? from + kMagnitudeTile : size;
    for (std::int64_t begin = from; begin < to; begin += kRows * kWarp) {
      unsigned keys[kRows];
      switch (static_cast<DType>(row.dtype)) {
        case DType::kBFloat16:
          load_keys<BFloat16>(row.weights, begin, to, keys);
          break;
        case DType::kFloat16:
          load_keys<__half>(row.weights, begin, to, keys);
          break;
        default:
          load_keys<float>(row.weights, begin, to, keys);
      }
      visit(tensor, row.first + begin, keys);
    }
  }
}

// The first index whose value is not below `key`, `count` where all are.
__device__ __forceinline__ int lower_bound(const unsigned* ascending, int count, unsigned key) {
  int first = 0;
  while (count > 0) {
    const int half = count / 2;
    if (ascending[first + half] < key) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// Calls visit(slot, lanes that hold it) for each slot that a lane holds; -1 is none.
template <typename Visit>
__device__ __forceinline__ void for_each_slot(int slot, const Visit& visit) {
  unsigned left = __ballot_sync(kAllLanes, slot >= 0);
  while (left != 0) {
    const int held = __shfl_sync(kAllLanes, slot, __ffs(static_cast<int>(left)) - 1);
    const unsigned same = __ballot_sync(kAllLanes, slot == held);
    visit(held, same);
    left &= ~same;
  }
}

__device__ __forceinline__ std::int64_t inclusive_sum(std::int64_t value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const std::int64_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// ---------------------------------------------------------------------------- radix select

__global__ void __launch_bounds__(kThreads, kResident)
    magnitude_begin_kernel(MagnitudeLevelsArgs args, Workspace work) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = thread; i < kPasses * args.levels * kBins; i += step) {
    work.histograms[i] = 0;
  }
  for (std::int64_t i = thread; i < args.tensor_count; i += step) args.nonfinite[i] = 0;
  for (std::int64_t i = thread; i < args.levels; i += step) {
    const std::int64_t count = args.counts[i];
    work.levels[i] = {0, count > 0 ? 0 : -1, count - 1};
  }
  if (thread == 0) {
    work.slot_keys[0] = 0;
    *work.slots = 1;
  }
}

// blockIdx.y is a group of kSlotsOfBlock slots.
__global__ void __launch_bounds__(kThreads, kResident)
    magnitude_histogram_kernel(MagnitudeLevelsArgs args, Workspace work, int pass) {
  __shared__ unsigned bins[kSlotsOfBlock * kBins];
  __shared__ unsigned slot_keys[kSlotsOfBlock];
  const int first = static_cast<int>(blockIdx.y) * kSlotsOfBlock;
  const int slots = *work.slots - first < kSlotsOfBlock ? *work.slots - first : kSlotsOfBlock;
  if (slots <= 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < slots * kBins; i += kThreads) bins[i] = 0;
  if (thread < slots) slot_keys[thread] = work.slot_keys[first + thread];
  __syncthreads();

  const int shift = 32 - kDigitBits * (pass + 1);
  for_each_batch(args, [&](std::int64_t tensor, std::int64_t, const unsigned (&keys)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned key = keys[r];
      if (pass == 0) {
        const unsigned bad = __ballot_sync(kAllLanes, key >= kInfinity && key != kNoKey);
        if (bad != 0 && thread % kWarp == 0) {
          atomicAdd(reinterpret_cast<Count*>(args.nonfinite) + tensor,
                    static_cast<Count>(__popc(bad)));
        }
      }
      if (key == kNoKey) continue;
      const unsigned begins = pass == 0 ? 0 : key >> (shift + kDigitBits);
      const int slot = lower_bound(slot_keys, slots, begins);
      if (slot < slots && slot_keys[slot] == begins) {
        atomicAdd(&bins[slot * kBins + ((key >> shift) & (kBins - 1))], 1u);
      }
    }
  });
  __syncthreads();

  Count* const histogram = work.histograms + (pass * args.levels + first) * kBins;
  for (int i = thread; i < slots * kBins; i += kThreads) {
    if (bins[i] != 0) atomicAdd(&histogram[i], static_cast<Count>(bins[i]));
  }
}

// One block: finds the digit of every level, a warp for each, and the slots of the next pass. After
// the last pass a level that removes all keys equal to its threshold has none to count: its
// threshold becomes the next key. Slots are then those of the levels that remove only some.
__global__ void __launch_bounds__(kNarrowMaxWarps* kWarp)
    magnitude_narrow_kernel(MagnitudeLevelsArgs args, Workspace work, int pass) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const bool last = pass == kPasses - 1;
  for (int l = warp; l < args.levels; l += warps) {
    const Level level = work.levels[l];
    if (level.slot < 0) continue;
    constexpr int kOfLane = kBins / kWarp;
    const Count* const histogram =
        work.histograms + (pass * args.levels + level.slot) * kBins + lane * kOfLane;
    std::int64_t sum = 0;
#pragma unroll
    for (int b = 0; b < kOfLane; ++b) sum += static_cast<std::int64_t>(histogram[b]);
    const std::int64_t up_to = inclusive_sum(sum);
    // The lane in whose bins the place lies: it alone goes on.
    if (level.rank >= up_to || level.rank < up_to - sum) continue;
    std::int64_t rank = level.rank - (up_to - sum);
    int bin = 0;
    while (rank >= static_cast<std::int64_t>(histogram[bin])) {
      rank -= static_cast<std::int64_t>(histogram[bin++]);
    }
    unsigned threshold =
        level.threshold << kDigitBits | static_cast<unsigned>(lane * kOfLane + bin);
    if (last && ++rank == static_cast<std::int64_t>(histogram[bin])) {
      ++threshold;
      rank = 0;
    }
    work.levels[l] = {threshold, level.slot, rank};
  }
  __syncthreads();

  if (warp != 0) return;
  const auto has_slot = [&](const Level& level) {
    return level.slot >= 0 && (!last || level.rank > 0);
  };
  int slots = 0;
  for (int base = 0; base < args.levels; base += kWarp) {
    const int l = base + lane;
    bool has = false;
    bool begins = false;
    unsigned threshold = 0;
    if (l < args.levels) {
      const Level level = work.levels[l];
      threshold = level.threshold;
      has = has_slot(level);
      begins = has;
      if (l > 0) {
        const Level before = work.levels[l - 1];
        begins = has && !(has_slot(before) && before.threshold == threshold);
      }
    }
    const unsigned all = __ballot_sync(kAllLanes, begins);  // every lane has read its levels
    const int slot = slots + __popc(all & (kAllLanes >> (kWarp - 1 - lane))) - 1;
    if (begins) work.slot_keys[slot] = threshold;
    if (l < args.levels) work.levels[l].slot = has ? slot : -1;
    slots += __popc(all);
    __syncwarp();
  }
  if (lane == 0) *work.slots = slots;
}

// ---------------------------------------------------------------------------- ties and codes

__global__ void __launch_bounds__(kThreads, kResident)
    magnitude_count_ties_kernel(MagnitudeLevelsArgs args, Workspace work) {
  __shared__ unsigned slot_keys[kMagnitudeMaxLevels];
  __shared__ std::int64_t ties[kWarps][kMagnitudeMaxLevels];
  const int slots = *work.slots;
  if (slots == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int s = static_cast<int>(threadIdx.x); s < slots; s += kThreads) {
    slot_keys[s] = work.slot_keys[s];
  }
  for (int s = lane; s < slots; s += kWarp) ties[warp][s] = 0;
  __syncthreads();

  for_each_batch(args, [&](std::int64_t, std::int64_t, const unsigned (&keys)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int found = lower_bound(slot_keys, slots, keys[r]);
      const int slot = found < slots && slot_keys[found] == keys[r] ? found : -1;
      for_each_slot(slot, [&](int s, unsigned lanes) {
        if (lane == 0) ties[warp][s] += __popc(lanes);
      });
    }
  });
  __syncwarp();
  const std::int64_t range = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  for (int s = lane; s < slots; s += kWarp) work.ties[s * work.ranges + range] = ties[warp][s];
}

// One block for each slot: the ties in a range become those in all ranges before it.
__global__ void __launch_bounds__(kScanThreads) magnitude_scan_ties_kernel(Workspace work) {
  __shared__ std::int64_t of_warps[kScanThreads / kWarp];
  if (static_cast<int>(blockIdx.x) >= *work.slots) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  std::int64_t* const ties = work.ties + blockIdx.x * work.ranges;
  // Each thread sums neighbours.
  const std::int64_t share = (work.ranges + kScanThreads - 1) / kScanThreads;
  const std::int64_t first = threadIdx.x * share;
  const std::int64_t last = first + share < work.ranges ? first + share : work.ranges;
  std::int64_t sum = 0;
  for (std::int64_t i = first; i < last; ++i) sum += ties[i];
  const std::int64_t up_to = inclusive_sum(sum);
  if (lane == kWarp - 1) of_warps[warp] = up_to;
  __syncthreads();
  std::int64_t before = up_to - sum;
  for (int w = 0; w < warp; ++w) before += of_warps[w];
  for (std::int64_t i = first; i < last; ++i) {
    const std::int64_t count = ties[i];
    ties[i] = before;
    before += count;
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    magnitude_codes_kernel(MagnitudeLevelsArgs args, Workspace work) {
  __shared__ unsigned thresholds[kMagnitudeMaxLevels];
  __shared__ std::int64_t ranks[kMagnitudeMaxLevels];
  __shared__ int slots_of[kMagnitudeMaxLevels];
  __shared__ std::int64_t ties[kWarps][kMagnitudeMaxLevels];  // of each slot so far
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int l = static_cast<int>(threadIdx.x); l < args.levels; l += kThreads) {
    const Level level = work.levels[l];
    thresholds[l] = level.threshold;
    ranks[l] = level.slot < 0 ? 0 : level.rank;
    slots_of[l] = level.slot;
  }
  const std::int64_t range = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  for (int s = lane; s < *work.slots; s += kWarp) {
    ties[warp][s] = work.ties[s * work.ranges + range];
  }
  __syncthreads();

  for_each_batch(args, [&](std::int64_t, std::int64_t place, const unsigned (&keys)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned key = keys[r];
      int code = lower_bound(thresholds, args.levels, key);
      const auto equal = [&] { return code < args.levels && thresholds[code] == key; };
      while (equal() && slots_of[code] < 0) ++code;
      const int slot = equal() ? slots_of[code] : -1;
      for_each_slot(slot, [&](int s, unsigned lanes) {
        const std::int64_t before =
            ties[warp][s] + __popc(lanes & ~(kAllLanes << lane));  // in the list
        __syncwarp();
        if (lane == 0) ties[warp][s] += __popc(lanes);
        __syncwarp();
        if (slot == s) {
          while (equal() && before >= ranks[code]) ++code;
        }
      });
      if (key != kNoKey) {
        args.codes[place + r * kWarp + lane] = static_cast<std::uint8_t>(code);
      }
    }
  });
}

// The arrays one behind the other; `bytes` is how many they take.
Workspace workspace_of(void* base, int levels, int blocks, std::size_t* bytes) {
  Workspace work{};
  std::uintptr_t next = reinterpret_cast<std::uintptr_t>(base);
  const auto take = [&next](auto*& array, std::int64_t count) {
    using T = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<T*>(next);
    next += (static_cast<std::size_t>(count) * sizeof(T) + 7) / 8 * 8;
  };
  work.ranges = ranges_of(blocks);
  take(work.levels, levels);
  take(work.slot_keys, levels);
  take(work.slots, 1);
  take(work.histograms, std::int64_t{kPasses} * levels * kBins);
  take(work.ties, levels * work.ranges);
  *bytes = next - reinterpret_cast<std::uintptr_t>(base);
  return work;
}

}  // namespace

std::size_t magnitude_levels_workspace(std::int32_t levels, std::int32_t blocks) {
  std::size_t bytes = 0;
  workspace_of(nullptr, levels, blocks, &bytes);
  return bytes;
}

Status magnitude_levels(const MagnitudeLevelsArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t wanted = (args.tiles + kWarps - 1) / kWarps;
  const int blocks = static_cast<int>(wanted < args.blocks ? wanted : args.blocks);
  std::size_t bytes = 0;
  const Workspace work = workspace_of(args.workspace, args.levels, blocks, &bytes);
  magnitude_begin_kernel<<<args.levels, kThreads, 0, on>>>(args, work);
  if (args.elements > 0) {
    const auto groups = static_cast<unsigned>((args.levels + kSlotsOfBlock - 1) / kSlotsOfBlock);
    const int warps = args.levels < kNarrowMaxWarps ? args.levels : kNarrowMaxWarps;
    for (int pass = 0; pass < kPasses; ++pass) {
      const dim3 grid(static_cast<unsigned>(blocks), pass == 0 ? 1 : groups);
      magnitude_histogram_kernel<<<grid, kThreads, 0, on>>>(args, work, pass);
      magnitude_narrow_kernel<<<1, warps * kWarp, 0, on>>>(args, work, pass);
    }
    magnitude_count_ties_kernel<<<blocks, kThreads, 0, on>>>(args, work);
    magnitude_scan_ties_kernel<<<args.levels, kScanThreads, 0, on>>>(work);
    magnitude_codes_kernel<<<blocks, kThreads, 0, on>>>(args, work);
  }
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
