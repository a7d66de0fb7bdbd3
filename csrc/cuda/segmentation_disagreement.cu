// CUDA kernels of `segmentation_disagreement`. The same name and contract as
// cpu/segmentation_disagreement.cpp.
//
// A block takes a chunk of pixels of one image, a thread kPixelsPerThread of them, one after the
// other. It prepares the dense model's probabilities of a pixel once for kLevels levels, whose sums
// stay in registers to the end of the chunk. Up to two classes a probability is the sigmoid of one
// number, up to kFewClasses all of a pixel's probabilities are in registers, above that they are
// computed again from logits that L1 or L2 hold. A second kernel adds the chunks up in their order:
// the same bits on every GPU, every time.
#include <cuda_runtime.h>

#include "cuda/element.h"
#include "fastpie/segmentation_disagreement.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPixelsPerThread = static_cast<int>(kIouChunk / kThreads);
static_assert(kPixelsPerThread == 16, "the contract's accuracy is that of fp32 sums of 16 pixels");
constexpr int kLevels = 4;  // of the default ladder
constexpr int kFewClasses = 8;

// ---------------------------------------------------------------------------- a pixel of one model

// exp(z - top) * scale is a probability. Intrinsics, since no compiler may contract differently for
// the two models: equal logits must have equal probabilities.
__device__ __forceinline__ float exp_from(float z, float top) { return expf(__fsub_rn(z, top)); }

// The logits of one pixel; class c lies at c * stride.
template <typename T>
struct Logits {
  const T* base;
  std::int64_t stride;
  __device__ __forceinline__ float operator[](int c) const { return to_float(base[c * stride]); }
};

// One or two classes.
template <typename T>
struct TwoClasses {
  // Blocks of a multiprocessor, as many as nothing spills for.
  static constexpr int kBlocks = 4;
  float p;
  int label;
  bool bad;

  __device__ __forceinline__ TwoClasses(const Logits<T>& logits, int classes) {
    float x = logits[0];
    bad = !(x < INFINITY);
    if (classes == 2) {
      const float foreground = logits[1];
      bad = bad || !(foreground < INFINITY);
      x = __fsub_rn(foreground, x);
      bad = bad || x != x;  // both -inf
    }
    const float e = expf(-fabsf(x));
    const float large = __frcp_rn(__fadd_rn(1.0f, e));
    p = x > 0.0f ? large : __fmul_rn(e, large);
    label = x > 0.0f;
  }
  template <typename F>
  __device__ __forceinline__ static void each(const TwoClasses& a, const TwoClasses& b, int,
                                              const F& compare) {
    compare(a.p, b.p);
  }
};

// Up to kFewClasses, in registers; classes that are not there have the probability 0.
template <typename T>
struct FewClasses {
  static constexpr int kBlocks = 3;
  float p[kFewClasses];
  int label;
  bool bad;

  __device__ __forceinline__ FewClasses(const Logits<T>& logits, int classes) {
#pragma unroll
    for (int c = 0; c < kFewClasses; ++c) p[c] = c < classes ? logits[c] : -INFINITY;
    float top = p[0];
    label = 0;
    bad = !(top < INFINITY);
#pragma unroll
    for (int c = 1; c < kFewClasses; ++c) {
      bad = bad || !(p[c] < INFINITY);
      label = p[c] > top ? c : label;
      top = p[c] > top ? p[c] : top;
    }
    bad = bad || top == -INFINITY;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kFewClasses; ++c) {
      p[c] = exp_from(p[c], top);
      sum = __fadd_rn(sum, p[c]);
    }
    const float scale = __frcp_rn(sum);
#pragma unroll
    for (int c = 1; c < kFewClasses; ++c) p[c] = __fmul_rn(p[c], scale);
  }
  template <typename F>
  __device__ __forceinline__ static void each(const FewClasses& a, const FewClasses& b, int,
                                              const F& compare) {
#pragma unroll
    for (int c = 1; c < kFewClasses; ++c) compare(a.p[c], b.p[c]);
  }
};

template <typename T>
struct ManyClasses {
  static constexpr int kBlocks = 2;
  Logits<T> logits;
  float top;
  float scale;
  int label;
  bool bad;

  __device__ __forceinline__ ManyClasses(const Logits<T>& all, int classes)
      : logits(all), top(-INFINITY), label(0), bad(false) {
    float sum = 0.0f;  // of exp(z - top)
    for (int c = 0; c < classes; ++c) {
      const float z = logits[c];
      bad = bad || !(z < INFINITY);
      const bool greater = z > top;
      const float e = z == top ? 1.0f : expf(-fabsf(__fsub_rn(z, top)));  // also of -inf and -inf
      sum = greater ? fmaf(sum, e, 1.0f) : __fadd_rn(sum, e);
      label = greater ? c : label;
      top = greater ? z : top;
    }
    bad = bad || top == -INFINITY;
    scale = __frcp_rn(sum);
  }
  __device__ __forceinline__ float probability(int c) const {
    return __fmul_rn(exp_from(logits[c], top), scale);
  }
  template <typename F>
  __device__ __forceinline__ static void each(const ManyClasses& a, const ManyClasses& b,
                                              int classes, const F& compare) {
    for (int c = 1; c < classes; ++c) compare(a.probability(c), b.probability(c));
  }
};

// ---------------------------------------------------------------------------- sums

// What a thread has of its chunk at one level.
struct Tally {
  float soft_intersection = 0.0f;
  float soft_union = 0.0f;
  int hard_intersection = 0;
  int hard_union = 0;
  int bad = 0;

  template <typename Pixel>
  __device__ __forceinline__ void add(const Pixel& dense, const Pixel& pruned, int classes) {
    float lower = 0.0f;
    float upper = 0.0f;
    Pixel::each(dense, pruned, classes, [&](float p, float q) {
      lower += fminf(p, q);
      upper += fmaxf(p, q);
    });
    soft_intersection += lower;
    soft_union += upper;
    const int same = dense.label != 0 && dense.label == pruned.label;
    hard_intersection += same;
    hard_union += (dense.label != 0) + (pruned.label != 0) - same;
    bad |= dense.bad || pruned.bad;
  }
};

__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ __forceinline__ IouPartial sum_of_warp(const Tally& tally) {
  return {sum_of_warp(static_cast<double>(tally.soft_intersection)),
          sum_of_warp(static_cast<double>(tally.soft_union)),
          __reduce_add_sync(kAllLanes, tally.hard_intersection),
          __reduce_add_sync(kAllLanes, tally.hard_union),
          static_cast<int>(__reduce_or_sync(kAllLanes, static_cast<unsigned>(tally.bad))),
          0};
}

// blockIdx.x is a chunk of an image, blockIdx.y a group of kLevels levels.
template <template <typename> class Pixel, typename T>
__global__ void __launch_bounds__(kThreads, Pixel<T>::kBlocks)
    segmentation_disagreement_kernel(const SegmentationDisagreementArgs args) {
  __shared__ IouPartial of_warps[kLevels][kWarps];
  const std::int64_t chunks = iou_chunks(args.pixels);
  const std::int64_t image = blockIdx.x / chunks;
  const std::int64_t chunk = blockIdx.x % chunks;
  const std::int64_t first_level = static_cast<std::int64_t>(blockIdx.y) * kLevels;
  const int classes = static_cast<int>(args.classes);
  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t begin = chunk * kIouChunk + tid;
  const std::int64_t end =
      min(static_cast<long long>((chunk + 1) * kIouChunk), static_cast<long long>(args.pixels));

  const T* const dense = static_cast<const T*>(args.dense) + image * args.dense_strides[0];
  const T* const pruned = static_cast<const T*>(args.pruned) +
                          first_level * args.pruned_strides[0] + image * args.pruned_strides[1];
  Tally tallies[kLevels];
  for (std::int64_t pixel = begin; pixel < end; pixel += kThreads) {
    const Pixel<T> of_dense({dense + pixel * args.dense_strides[2], args.dense_strides[1]},
                            classes);
    const T* of_level = pruned + pixel * args.pruned_strides[3];
#pragma unroll
    for (int l = 0; l < kLevels; ++l) {
      if (first_level + l >= args.levels) break;
      const Pixel<T> of_pruned({of_level, args.pruned_strides[2]}, classes);
      tallies[l].add(of_dense, of_pruned, classes);
      of_level += args.pruned_strides[0];
    }
  }

#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    if (first_level + l >= args.levels) break;
    const IouPartial of_warp = sum_of_warp(tallies[l]);
    if (tid % kWarp == 0) of_warps[l][tid / kWarp] = of_warp;
  }
  __syncthreads();
  const std::int64_t level = first_level + tid;
  if (tid >= kLevels || level >= args.levels) return;
  IouPartial sum{};
  for (int warp = 0; warp < kWarps; ++warp) {
    const IouPartial& other = of_warps[tid][warp];
    sum.soft_intersection += other.soft_intersection;
    sum.soft_union += other.soft_union;
    sum.hard_intersection += other.hard_intersection;
    sum.hard_union += other.hard_union;
    sum.bad |= other.bad;
  }
  args.partials[(level * args.images + image) * chunks + chunk] = sum;
}

// A block adds up the chunks of one image at one level.
__global__ void __launch_bounds__(kThreads)
    segmentation_disagreement_total_kernel(const SegmentationDisagreementArgs args) {
  __shared__ double soft[kWarps][2];
  __shared__ long long hard[kWarps][2];
  const std::int64_t chunks = iou_chunks(args.pixels);
  const std::int64_t i = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x);
  double soft_intersection = 0.0;
  double soft_union = 0.0;
  long long hard_intersection = 0;
  long long hard_union = 0;
  int bad = 0;
#pragma unroll 4
  for (std::int64_t chunk = tid; chunk < chunks; chunk += kThreads) {
    const IouPartial& partial = args.partials[i * chunks + chunk];
    soft_intersection += partial.soft_intersection;
    soft_union += partial.soft_union;
    hard_intersection += partial.hard_intersection;
    hard_union += partial.hard_union;
    bad |= partial.bad;
  }
  soft_intersection = sum_of_warp(soft_intersection);
  soft_union = sum_of_warp(soft_union);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    hard_intersection += __shfl_xor_sync(kAllLanes, hard_intersection, mask);
    hard_union += __shfl_xor_sync(kAllLanes, hard_union, mask);
  }
  if (tid % kWarp == 0) {
    soft[tid / kWarp][0] = soft_intersection;
    soft[tid / kWarp][1] = soft_union;
    hard[tid / kWarp][0] = hard_intersection;
    hard[tid / kWarp][1] = hard_union;
  }
  bad = __syncthreads_or(bad);
  if (tid != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    soft_intersection += soft[warp][0];
    soft_union += soft[warp][1];
    hard_intersection += hard[warp][0];
    hard_union += hard[warp][1];
  }
  const double iou = hard_union > 0
                         ? static_cast<double>(hard_intersection) / static_cast<double>(hard_union)
                         : 1.0;
  const double iou_soft = soft_union >= kNoForeground ? soft_intersection / soft_union : 1.0;
  const std::int64_t count = args.levels * args.images;
  args.out[kIou * count + i] = bad ? NAN : static_cast<float>(iou);
  args.out[kIouSoft * count + i] = bad ? NAN : static_cast<float>(iou_soft);
}

// ---------------------------------------------------------------------------- launches

cudaLaunchConfig_t launch_config(std::int64_t blocks_x, std::int64_t blocks_y, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

template <typename T>
cudaError_t launch(const SegmentationDisagreementArgs& args, void* stream) {
  const auto config = launch_config(args.images * iou_chunks(args.pixels),
                                    (args.levels + kLevels - 1) / kLevels, stream);
  if (config.gridDim.x == 0) return cudaSuccess;  // no pixels: a launch of no blocks is an error
  const auto kernel = args.classes <= 2 ? segmentation_disagreement_kernel<TwoClasses, T>
                      : args.classes <= kFewClasses
                          ? segmentation_disagreement_kernel<FewClasses, T>
                          : segmentation_disagreement_kernel<ManyClasses, T>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace

Status segmentation_disagreement(const SegmentationDisagreementArgs& args, void* stream) {
  if (args.images == 0 || args.levels == 0) return {};
  constexpr std::int64_t kMaxBlocks = 0x7fffffff;  // of a grid's first dimension
  constexpr std::int64_t kMaxGroups = 65535;       // of its second
  if (args.images * iou_chunks(args.pixels) > kMaxBlocks ||
      args.levels * args.images > kMaxBlocks || args.levels > kMaxGroups * kLevels) {
    return {"Expected fewer images, pixels or levels in one call"};
  }
  cudaError_t error = cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat32:
      error = launch<float>(args, stream);
      break;
    case DType::kBFloat16:
      error = launch<BFloat16Bits>(args, stream);
      break;
    case DType::kFloat16:
      error = launch<__half>(args, stream);
      break;
  }
  if (error == cudaSuccess) {
    const auto config = launch_config(args.levels * args.images, 1, stream);
    error = cudaLaunchKernelEx(&config, segmentation_disagreement_total_kernel, args);
  }
  if (error == cudaSuccess) error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace fastpie::cuda
