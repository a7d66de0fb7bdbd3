// CUDA kernel of `top_k_update`, with the contract of top_k.h.
//
// One block: a batch has hundreds of samples and most of them do not enter, so what there is to do
// is one look at each score. The few that come before the last of the state wait in shared memory
// until there are many or the batch is over; then each finds its place by binary search in the
// state and by counting among those that wait, and the state behind the first of them moves up,
// from its end, one tile of kThreads at a time. The order in which threads append does not show:
// places follow from the total order alone.
//
// The kernel is not part of `disagreement`'s launch. A block of that one that merges when it is the
// last to finish would need this shared memory and these registers in every block; a second launch
// on the same stream costs its launch, and none of the scoring kernels' occupancy (not measured).
#include <cuda_runtime.h>

#include "fastpie/top_k.h"

namespace fastpie::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kPerThread = 2;
constexpr int kCapacity = kPerThread * kThreads;  // samples that can wait

__device__ __forceinline__ bool before(float value, std::int64_t id, float other,
                                       std::int64_t other_id) {
  return value > other || (value == other && id < other_id);
}

__device__ __forceinline__ float mean_score(const TopKUpdateArgs& args, std::int64_t i) {
  double sum = 0.0;
  for (std::int64_t level = 0; level < args.levels; ++level) {
    sum += static_cast<double>(args.scores[level * args.level_stride + i]);
  }
  return static_cast<float>(sum / static_cast<double>(args.levels));
}

// How many samples of the state come before this one or are equal to it.
__device__ __forceinline__ std::int64_t place_in_state(const TopKUpdateArgs& args, float value,
                                                       std::int64_t id) {
  std::int64_t begin = 0;
  std::int64_t end = args.k;
  while (begin < end) {
    const std::int64_t middle = (begin + end) / 2;
    if (before(value, id, args.values[middle], args.ids[middle])) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

struct Waiting {
  float values[kCapacity];
  std::int64_t ids[kCapacity];
  std::int64_t places[kCapacity];  // in the old state, ascending
  int count;
};

// Merges the `count` samples that wait into the state. All threads of the block call it.
__device__ void merge(const TopKUpdateArgs& args, int count, Waiting* waiting) {
  const int tid = static_cast<int>(threadIdx.x);
  float value[kPerThread];
  std::int64_t id[kPerThread];
  std::int64_t place[kPerThread];
  __syncthreads();  // all that wait are there
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    const int mine = tid + p * kThreads;
    if (mine >= count) break;
    value[p] = waiting->values[mine];
    id[p] = waiting->ids[mine];
    int rank = 0;
    for (int other = 0; other < count; ++other) {
      const float other_value = waiting->values[other];
      if (other_value < value[p]) continue;
      const std::int64_t other_id = waiting->ids[other];
      const bool same = other_value == value[p] && other_id == id[p];
      rank += same ? other < mine : before(other_value, other_id, value[p], id[p]);
    }
    place[p] = place_in_state(args, value[p], id[p]);
    waiting->places[rank] = place[p];
    place[p] += rank;
  }
  __syncthreads();
  const std::int64_t first = waiting->places[0];
  for (std::int64_t end = args.k; end > first; end -= kThreads) {
    const std::int64_t from = end - kThreads + tid;
    float moved = 0.0f;
    std::int64_t moved_id = 0;
    std::int64_t to = args.k;
    if (from >= first) {
      moved = args.values[from];
      moved_id = args.ids[from];
      int begin = 0;  // of the places, those up to `from` push it back
      int stop = count;
      while (begin < stop) {
        const int middle = (begin + stop) / 2;
        if (waiting->places[middle] <= from) {
          begin = middle + 1;
        } else {
          stop = middle;
        }
      }
      to = from + begin;
    }
    // This tile is read. It moves back, never to where the tiles before it are still to be read.
    __syncthreads();
    if (to < args.k) {
      args.values[to] = moved;
      args.ids[to] = moved_id;
    }
  }
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    if (tid + p * kThreads < count && place[p] < args.k) {
      args.values[place[p]] = value[p];
      args.ids[place[p]] = id[p];
    }
  }
  if (tid == 0) waiting->count = 0;
  __syncthreads();  // the state is whole and the shared memory free
}

__global__ void __launch_bounds__(kThreads) top_k_update_kernel(const TopKUpdateArgs args) {
  __shared__ Waiting waiting;
  if (threadIdx.x == 0) waiting.count = 0;
  float last = args.values[args.k - 1];
  std::int64_t last_id = args.ids[args.k - 1];
  int count = 0;  // as waiting.count, the same in all threads
  for (std::int64_t begin = 0; begin < args.count; begin += kThreads) {
    const std::int64_t i = begin + threadIdx.x;
    float value = -INFINITY;
    std::int64_t id = 0;
    if (i < args.count) {
      value = mean_score(args, i);
      id = args.new_ids != nullptr ? args.new_ids[i] : args.first_id + i;
    }
    const bool enters = value > -INFINITY && before(value, id, last, last_id);
    const int more = __syncthreads_count(enters);
    if (more == 0) continue;
    if (count + more > kCapacity) {
      merge(args, count, &waiting);
      count = 0;
      last = args.values[args.k - 1];
      last_id = args.ids[args.k - 1];
    }
    if (enters) {  // by the old last sample; one that no longer does finds a place beyond the end
      const int slot = atomicAdd(&waiting.count, 1);
      waiting.values[slot] = value;
      waiting.ids[slot] = id;
    }
    count += more;
  }
  if (count > 0) merge(args, count, &waiting);
}

}  // namespace

Status top_k_update(const TopKUpdateArgs& args, void* stream) {
  if (args.k < 1) return {"Expected k >= 1"};
  if (args.count == 0) return {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t launched = cudaLaunchKernelEx(&config, top_k_update_kernel, args);
  const cudaError_t error = launched != cudaSuccess ? launched : cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
