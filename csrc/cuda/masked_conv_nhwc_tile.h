// The parts of masked_conv_nhwc that do not depend on how the products are made: how the work is
// cut, the copies to shared memory, the bits of the masks, the way out, and the launch.
#pragma once

#include <climits>

#include "cuda/masked_conv_nhwc.h"

namespace fastpie::cuda {

constexpr int kWarp = 32;
constexpr int kVector = 8;  // halves in 16 bytes

template <int kFilters_, int kPixels_, int kDepth_, int kWarpFilters_, int kWarpPixels_,
          int kStages_, int kBlocks_, int kDualBlocks_>
struct Tile {
  static constexpr int kFilters = kFilters_;
  static constexpr int kPixels = kPixels_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kWarpFilters = kWarpFilters_;
  static constexpr int kWarpPixels = kWarpPixels_;
  static constexpr int kStages = kStages_;
  // On a multiprocessor, of one model and of two: the compiler spills no register to have more.
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kDualBlocks = kDualBlocks_;
  static constexpr int kFilterWarps = kFilters / kWarpFilters;
  static constexpr int kWarps = kFilterWarps * (kPixels / kWarpPixels);
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kChunks = kDepth / kVector;  // of a row in shared memory
  static constexpr int kRowStep = kThreads / kChunks;
  // Results on their way out: fp32, pixel by pixel. A row of 4 more floats than a multiple of 16
  // puts the eight rows and four columns that a warp writes at once in 32 different banks.
  static constexpr int kStagedRow = kFilters + 4;
  static constexpr int kStagedBytes = 4 * kPixels * kStagedRow;

  static_assert(kDepth == 32 || kDepth == 64, "rows of 64 or 128 bytes, see `swizzled`");
  static_assert(kWarpFilters % 16 == 0 && kWarpPixels % 16 == 0, "whole fragments");
  static_assert(kFilters % kRowStep == 0 && kPixels % kRowStep == 0, "all threads load alike");
  static_assert(kThreads % (kFilters / kVector) == 0, "a thread keeps its filters");

  static constexpr int stage_elements(int inputs) { return (kFilters + inputs * kPixels) * kDepth; }
  static constexpr int shared_bytes(int inputs) {
    const int pipeline = 2 * kStages * stage_elements(inputs);
    return pipeline > kStagedBytes ? pipeline : kStagedBytes;
  }
};

// The block's place in the product.
struct ConvBlock {
  int first_pixel, group, first_filter;  // of the group

  // The filters of the same pixels are neighbours in time: the activations come from L2.
  template <typename K>
  static __device__ __forceinline__ ConvBlock of(int filter_tiles, int groups) {
    const unsigned tiles = static_cast<unsigned>(filter_tiles) * static_cast<unsigned>(groups);
    const int filter_tile = static_cast<int>(blockIdx.x % tiles);
    return {static_cast<int>(blockIdx.x / tiles) * K::kPixels, filter_tile / filter_tiles,
            filter_tile % filter_tiles * K::kFilters};
  }
};

// Where the 16 bytes of `chunk` in `row` of a tile lie, in elements: eight rows at one chunk, as
// `ldmatrix` reads them, and eight chunks as the copies write them, are in different banks.
template <int kDepth>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  const int key = kDepth == 64 ? row & 7 : (row >> 1) & 3;
  return row * kDepth + (chunk ^ key) * kVector;
}

// A place in the depth of the product. It only moves forward.
struct Place {
  int channel;
  int tap[3];

  // The taps come one after another, so that few steps are needed whatever `elements` is.
  __device__ __forceinline__ void advance(const ConvProblem& p, int elements) {
    channel += elements;
    while (channel >= p.channels) {
      channel -= p.channels;
      if (++tap[2] < p.kernel[2]) continue;
      tap[2] = 0;
      if (++tap[1] < p.kernel[1]) continue;
      tap[1] = 0;
      ++tap[0];
    }
  }
  __device__ __forceinline__ bool exists(const ConvProblem& p) const {
    return tap[0] < p.kernel[0];
  }
};

// Moves the tiles of A and of each input's B to shared memory, one step of depth after another.
template <typename T, typename K, int kInputs, bool kVectorInput>
struct Loader {
  static constexpr int kFilterRows = K::kFilters / K::kRowStep;
  static constexpr int kPixelRows = K::kPixels / K::kRowStep;

  const ConvProblem& p;
  const std::uint16_t* inputs[2];  // at the group's first channel
  std::int64_t image[kPixelRows];  // offset of the pixel's image
  int start[kPixelRows][3];
  Place place;
  int depth;  // of this thread's chunk
  int row, chunk;
  int weights;  // offset of this thread's first row
  int rows;     // how many of the tile's filters exist, from this thread's first row on

  __device__ __forceinline__ Loader(const ConvProblem& problem, const ConvBlock& block)
      : p(problem),
        depth(static_cast<int>(threadIdx.x) % K::kChunks * kVector),
        row(static_cast<int>(threadIdx.x) / K::kChunks),
        chunk(static_cast<int>(threadIdx.x) % K::kChunks) {
#pragma unroll
    for (int m = 0; m < kInputs; ++m) {
      inputs[m] = static_cast<const std::uint16_t*>(p.models[m].input) +
                  static_cast<std::int64_t>(block.group) * p.channels;
    }
    place = {0, {0, 0, 0}};
    place.advance(p, depth);
    weights = (block.group * p.group_filters + block.first_filter + row) * p.depth;
    rows = p.group_filters - block.first_filter - row;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int index = block.first_pixel + row + i * K::kRowStep;
      const ConvPixel pixel(p, index < p.pixels ? index : 0);
      image[i] = pixel.image * p.image_elements;
#pragma unroll
      for (int d = 0; d < 3; ++d) start[i][d] = pixel.start[d];
      if (index >= p.pixels) start[i][0] = INT_MIN / 2;  // its window is outside the image
    }
  }

  // Where the window of pixel `i` has `at`, or -1 outside the image.
  __device__ __forceinline__ std::int64_t offset(int i, const Place& at) const {
    const int z = start[i][0] + at.tap[0] * p.dilation[0];
    const int y = start[i][1] + at.tap[1] * p.dilation[1];
    const int x = start[i][2] + at.tap[2] * p.dilation[2];
    const bool inside = static_cast<unsigned>(z) < static_cast<unsigned>(p.input_size[0]) &&
                        static_cast<unsigned>(y) < static_cast<unsigned>(p.input_size[1]) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(p.input_size[2]);
    if (!inside || !at.exists(p)) return -1;
    const int pixel = (z * p.input_size[1] + y) * p.input_size[2] + x;
    return image[i] + pixel * p.pixel_elements + at.channel;
  }

  // Starts to load the next step into `stage`.
  __device__ __forceinline__ void load(std::uint16_t* stage) {
    if constexpr (kVectorInput) {
      load_vectors(stage);
    } else {
      load_elements(stage);
    }
    place.advance(p, K::kDepth);
    depth += K::kDepth;
  }

  __device__ __forceinline__ void load_vectors(std::uint16_t* stage) {
#pragma unroll
    for (int i = 0; i < kFilterRows; ++i) {
      const bool exists = i * K::kRowStep < rows && depth < p.depth;
      const int from = weights + i * K::kRowStep * p.depth;
      copy_async_16(stage + swizzled<K::kDepth>(row + i * K::kRowStep, chunk),
                    p.weight + (exists ? from + depth : 0), exists ? 16 : 0);
    }
    std::uint16_t* const pixels = stage + K::kFilters * K::kDepth;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const std::int64_t from = offset(i, place);
      const int to = swizzled<K::kDepth>(row + i * K::kRowStep, chunk);
#pragma unroll
      for (int m = 0; m < kInputs; ++m) {
        copy_async_16(pixels + m * K::kPixels * K::kDepth + to, inputs[m] + (from < 0 ? 0 : from),
                      from < 0 ? 0 : 16);
      }
    }
  }

  // For channels that are no multiple of 8: a chunk has parts of several taps.
  __device__ __forceinline__ void load_elements(std::uint16_t* stage) {
#pragma unroll
    for (int i = 0; i < kFilterRows; ++i) {
      const int from = weights + i * K::kRowStep * p.depth + depth;
      std::uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (i * K::kRowStep < rows && depth + e < p.depth) {
          words[e / 2] |= static_cast<std::uint32_t>(p.weight[from + e]) << (16 * (e % 2));
        }
      }
      *reinterpret_cast<uint4*>(stage + swizzled<K::kDepth>(row + i * K::kRowStep, chunk)) = {
          words[0], words[1], words[2], words[3]};
    }
    std::uint16_t* const pixels = stage + K::kFilters * K::kDepth;
    std::uint32_t words[kPixelRows][kInputs][4] = {};
    Place at = place;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
#pragma unroll
      for (int i = 0; i < kPixelRows; ++i) {
        const std::int64_t from = offset(i, at);
        if (from < 0) continue;
#pragma unroll
        for (int m = 0; m < kInputs; ++m) {
          words[i][m][e / 2] |= static_cast<std::uint32_t>(inputs[m][from]) << (16 * (e % 2));
        }
      }
      at.advance(p, 1);
    }
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
#pragma unroll
      for (int m = 0; m < kInputs; ++m) {
        const std::uint32_t (&w)[4] = words[i][m];
        *reinterpret_cast<uint4*>(pixels + m * K::kPixels * K::kDepth +
                                  swizzled<K::kDepth>(row + i * K::kRowStep, chunk)) = {w[0], w[1],
                                                                                        w[2], w[3]};
      }
    }
  }
};

// The mask bits of one lane's rows, 32 elements of depth to a word, moved so that the lane's first
// element, 2 (lane % 4), is bit 0.
template <typename K>
struct MaskBits {
  static constexpr int kRows = K::kWarpFilters / 8;
  static constexpr int kWords = K::kDepth / 32;

  std::uint32_t words[kRows][kWords];
};

// Reads the bits of the masks, one step of depth after another.
template <typename K, int kModels>
struct MaskReader {
  const ConvProblem& p;
  int first_word;  // of the lane's first row
  int rows;        // that exist from the lane's first on
  int shift;
  int tap = 0;
  int channel = 0;

  __device__ __forceinline__ MaskReader(const ConvProblem& problem, const ConvBlock& block,
                                        int warp_filter, int lane)
      : p(problem),
        first_word((block.group * p.group_filters + block.first_filter + warp_filter + lane / 4) *
                   p.taps * p.words),
        rows(p.group_filters - block.first_filter - warp_filter - lane / 4),
        shift(lane % 4 * 2) {}

  // 32 bits of a row from `tap` and `channel` on.
  __device__ __forceinline__ std::uint32_t bits(const std::uint32_t* row) const {
    if (p.channels % 32 == 0) {  // there they are one word
      return tap < p.taps ? row[tap * p.words + channel / 32] : 0;
    }
    std::uint32_t result = 0;
    int at_tap = tap;
    int at_channel = channel;
    for (int have = 0; have < 32 && at_tap < p.taps;) {
      const int bit = at_channel % 32;
      const int count = min(32 - bit, p.channels - at_channel);
      std::uint32_t word = row[at_tap * p.words + at_channel / 32] >> bit;
      if (count < 32) word &= (1u << count) - 1u;
      result |= word << have;
      have += count;
      at_channel += count;
      if (at_channel == p.channels) {
        at_channel = 0;
        ++at_tap;
      }
    }
    return result;
  }

  __device__ __forceinline__ void next(MaskBits<K> (&to)[kModels]) {
#pragma unroll
    for (int w = 0; w < MaskBits<K>::kWords; ++w) {
#pragma unroll
      for (int m = 0; m < kModels; ++m) {
        const std::uint32_t* const mask = p.models[m].mask;
#pragma unroll
        for (int i = 0; i < MaskBits<K>::kRows; ++i) {
          std::uint32_t word = 0xffffffffu;
          if (mask != nullptr && 8 * i < rows) {
            word = bits(mask + first_word + 8 * i * p.taps * p.words);
          }
          to[m].words[i][w] = word >> shift;
        }
      }
      channel += 32;
      while (channel >= p.channels) {
        channel -= p.channels;
        ++tap;
      }
    }
  }
};

// All ones in the two halves, elements 8 kPair and the next one, whose bits are set. Shifted, the
// bits of every eighth element are the signs of four bytes, which one instruction makes masks of.
template <int kPair>
__device__ __forceinline__ std::uint32_t expand(std::uint32_t word) {
  return permute_bytes(word << 7, word << 6, 0xcc88u + 0x1111u * kPair);
}

// Masks sixteen elements of one fragment of A, those of the first or the second half of a word.
template <int kHalf, typename K>
__device__ __forceinline__ void mask_fragment(const MaskBits<K>& bits, int fragment, int word,
                                              std::uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows g and g + 8 of the fragment
    const std::uint32_t w = bits.words[2 * fragment + i][word];
    a[i] &= expand<2 * kHalf>(w);
    a[i + 2] &= expand<2 * kHalf + 1>(w);
  }
}

// Out: the fragments of a warp whose first filter and pixel these are in the tile, to `staged`,
// shared memory for K::kStagedBytes, one model at a time, and from there 16 bytes at a time.
template <typename T, typename K, int kModels, int kRows, int kColumns>
__device__ __forceinline__ void write_results(const ConvProblem& p, const ConvBlock& block,
                                              float* staged, int warp_filter, int warp_pixel,
                                              const float (&sums)[kModels][kRows][kColumns][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  constexpr int kOutChunks = K::kFilters / kVector;
  constexpr int kOutStep = K::kThreads / kOutChunks;
  const int out_filter = static_cast<int>(threadIdx.x) % kOutChunks * kVector;
  const int count = min(kVector, p.group_filters - block.first_filter - out_filter);
  const std::int64_t filter =
      static_cast<std::int64_t>(block.group) * p.group_filters + block.first_filter + out_filter;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    __syncthreads();  // the stages, or the other model's results, are read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int at =
            (warp_pixel + 8 * n + lane % 4 * 2) * K::kStagedRow + warp_filter + 16 * r + lane / 4;
        staged[at] = sums[m][r][n][0];
        staged[at + K::kStagedRow] = sums[m][r][n][1];
        staged[at + 8] = sums[m][r][n][2];
        staged[at + K::kStagedRow + 8] = sums[m][r][n][3];
      }
    }
    __syncthreads();
    if (count <= 0) continue;
    const MaskedConvNhwcModel& model = p.models[m];
    float scale[8];
    float bias[8];
    conv_scale_and_bias(model, filter, count, scale, bias);
    for (int n = static_cast<int>(threadIdx.x) / kOutChunks; n < K::kPixels; n += kOutStep) {
      if (block.first_pixel + n >= p.pixels) break;
      const auto* const from =
          reinterpret_cast<const float4*>(staged + n * K::kStagedRow + out_filter);
      const float4 low = from[0];
      const float4 high = from[1];
      float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      conv_epilogue<T>(p, model, values, scale, bias,
                       static_cast<std::int64_t>(block.first_pixel + n) * p.filters + filter,
                       count);
    }
  }
}

// Launches `kernel` for all tiles of the product, with the shared memory of a K with `kInputs`.
template <typename K, int kInputs>
Status launch_tiles(void (*kernel)(const ConvProblem, int, int), const ConvProblem& p, int groups,
                    void* stream) {
  const int filter_tiles = (p.group_filters + K::kFilters - 1) / K::kFilters;
  const std::int64_t blocks = static_cast<std::int64_t>(filter_tiles) * groups *
                              ((p.pixels + std::int64_t{K::kPixels} - 1) / K::kPixels);
  if (blocks > INT_MAX) return {"Expected a layer of fewer than 2^31 tiles"};
  constexpr int kShared = K::shared_bytes(kInputs);
  if (kShared > 48 * 1024) {  // more must be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return {cudaGetErrorString(error)};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(K::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, filter_tiles, groups);
  const cudaError_t result = error != cudaSuccess ? error : cudaGetLastError();
  return {result == cudaSuccess ? nullptr : cudaGetErrorString(result)};
}

template <typename K>
constexpr MaskedConvNhwcTile describe() {
  return {K::kFilters, K::kPixels,         K::kDepth,         K::kWarps,
          K::kStages,  K::shared_bytes(1), K::shared_bytes(2)};
}

}  // namespace fastpie::cuda
