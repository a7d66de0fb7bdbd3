// CUDA kernel of `masked_conv_nhwc`: an implicit matrix product on tensor cores.
//
//   D [filters, pixels] = A [filters, depth] B [depth, pixels],   depth = taps * channels
//
// A is the weights as they lie in memory. Its fragments are loaded once and serve both models: raw
// where nothing is masked, and with the bits of the mask expanded in registers. B is gathered from
// the activations by the copies to shared memory themselves, eight channels of one tap and pixel at
// a time, zeros where the window leaves the image. A block computes one tile of D, of both models.
//
// Mask bits never pass through shared memory: a lane reads the words of its own rows one step
// ahead; four lanes read the same word, and eight steps the same 32 bytes.
#include <climits>
#include <utility>

#include "cuda/masked_conv_nhwc.h"

namespace fastpie::cuda {
namespace {

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

  __device__ __forceinline__ Loader(const ConvProblem& problem, int group, int first_filter,
                                    int first_pixel)
      : p(problem),
        depth(static_cast<int>(threadIdx.x) % K::kChunks * kVector),
        row(static_cast<int>(threadIdx.x) / K::kChunks),
        chunk(static_cast<int>(threadIdx.x) % K::kChunks) {
#pragma unroll
    for (int m = 0; m < kInputs; ++m) {
      inputs[m] = static_cast<const std::uint16_t*>(p.models[m].input) +
                  static_cast<std::int64_t>(group) * p.channels;
    }
    place = {0, {0, 0, 0}};
    place.advance(p, depth);
    weights = (group * p.group_filters + first_filter + row) * p.depth;
    rows = p.group_filters - first_filter - row;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int index = first_pixel + row + i * K::kRowStep;
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

  __device__ __forceinline__ MaskReader(const ConvProblem& problem, int filter, int group_rows,
                                        int lane)
      : p(problem),
        first_word((filter + lane / 4) * p.taps * p.words),
        rows(group_rows - lane / 4),
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

template <typename T, typename K, int kModels, int kInputs>
struct Product {
  static constexpr int kRows = K::kWarpFilters / 16;
  static constexpr int kColumns = K::kWarpPixels / 8;

  float sums[kModels][kRows][kColumns][4] = {};

  // Sixteen elements of a fragment, the first or the second half of a word.
  template <int kHalf>
  __device__ __forceinline__ void mask(const MaskBits<K>& bits, int row, int word,
                                       std::uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rows g and g + 8 of the fragment
      const std::uint32_t w = bits.words[2 * row + i][word];
      a[i] &= expand<2 * kHalf>(w);
      a[i + 2] &= expand<2 * kHalf + 1>(w);
    }
  }

  // Sixteen elements of depth.
  template <bool kFirstMasked, int kAt>
  __device__ __forceinline__ void multiply(const std::uint16_t* stage, int first_filter,
                                           int first_pixel, int lane,
                                           const MaskBits<K> (&bits)[kModels]) {
    std::uint32_t a[kModels][kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      std::uint32_t raw[4];
      load_matrix_x4(
          raw, stage + swizzled<K::kDepth>(first_filter + 16 * r + lane % 16, 2 * kAt + lane / 16));
#pragma unroll
      for (int m = 0; m < kModels; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][r][i] = raw[i];
        if (kFirstMasked || m > 0) mask<kAt % 2>(bits[m], r, kAt / 2, a[m][r]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
#pragma unroll
      for (int input = 0; input < kInputs; ++input) {
        std::uint32_t words[4];
        load_matrix_x4(words,
                       stage + (K::kFilters + input * K::kPixels) * K::kDepth +
                           swizzled<K::kDepth>(first_pixel + 8 * n + lane / 16 * 8 + lane % 8,
                                               2 * kAt + lane / 8 % 2));
        const std::uint32_t b[2][2] = {{words[0], words[1]}, {words[2], words[3]}};
#pragma unroll
        for (int m = input; m < (kInputs == 1 ? kModels : input + 1); ++m) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            T::mma(sums[m][r][n], a[m][r], b[0]);
            T::mma(sums[m][r][n + 1], a[m][r], b[1]);
          }
        }
      }
    }
  }

  template <bool kFirstMasked>
  __device__ __forceinline__ void step(const std::uint16_t* stage, int first_filter,
                                       int first_pixel, int lane,
                                       const MaskBits<K> (&bits)[kModels]) {
    multiply<kFirstMasked, 0>(stage, first_filter, first_pixel, lane, bits);
    multiply<kFirstMasked, 1>(stage, first_filter, first_pixel, lane, bits);
    if constexpr (K::kDepth == 64) {
      multiply<kFirstMasked, 2>(stage, first_filter, first_pixel, lane, bits);
      multiply<kFirstMasked, 3>(stage, first_filter, first_pixel, lane, bits);
    }
  }
};

extern __shared__ __align__(128) unsigned char conv_memory[];

template <typename T, typename K, int kModels, int kInputs, bool kVectorInput>
__global__ void __launch_bounds__(K::kThreads, kModels == 1 ? K::kBlocks : K::kDualBlocks)
    masked_conv_nhwc_kernel(const ConvProblem p, int filter_tiles, int groups) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_filter = warp % K::kFilterWarps * K::kWarpFilters;
  const int warp_pixel = warp / K::kFilterWarps * K::kWarpPixels;
  // The filters of the same pixels are neighbours in time: the activations come from L2.
  const unsigned tiles = static_cast<unsigned>(filter_tiles) * static_cast<unsigned>(groups);
  const int filter_tile = static_cast<int>(blockIdx.x % tiles);
  const int first_pixel = static_cast<int>(blockIdx.x / tiles) * K::kPixels;
  const int group = filter_tile / filter_tiles;
  const int first_filter = filter_tile % filter_tiles * K::kFilters;

  auto* const stages = reinterpret_cast<std::uint16_t*>(conv_memory);
  constexpr int kStage = K::stage_elements(kInputs);
  Loader<T, K, kInputs, kVectorInput> loader(p, group, first_filter, first_pixel);
  Product<T, K, kModels, kInputs> product;
  const int steps = (p.depth + K::kDepth - 1) / K::kDepth;
  const bool first_masked = p.models[0].mask != nullptr;

#pragma unroll
  for (int s = 0; s < K::kStages - 1; ++s) {
    if (s < steps) loader.load(stages + s * kStage);
    copy_async_commit();
  }
  MaskReader<K, kModels> reader(p, group * p.group_filters + first_filter + warp_filter,
                                p.group_filters - first_filter - warp_filter, lane);
  MaskBits<K> bits[kModels];
  MaskBits<K> next[kModels];
  reader.next(next);

  int stage = 0;
  int free_stage = K::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<K::kStages - 2>();
    __syncthreads();  // this step has arrived for all, and all have left the stage before it
    if (step + K::kStages - 1 < steps) loader.load(stages + free_stage * kStage);
    copy_async_commit();
#pragma unroll
    for (int m = 0; m < kModels; ++m) bits[m] = next[m];
    reader.next(next);
    if (first_masked) {
      product.template step<true>(stages + stage * kStage, warp_filter, warp_pixel, lane, bits);
    } else {
      product.template step<false>(stages + stage * kStage, warp_filter, warp_pixel, lane, bits);
    }
    free_stage = stage;
    stage = stage + 1 == K::kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();

  // Out: fragments to shared memory, one model at a time, and from there 16 bytes at a time.
  auto* const staged = reinterpret_cast<float*>(conv_memory);
  constexpr int kOutChunks = K::kFilters / kVector;
  constexpr int kOutStep = K::kThreads / kOutChunks;
  const int out_filter = static_cast<int>(threadIdx.x) % kOutChunks * kVector;
  const int count = min(kVector, p.group_filters - first_filter - out_filter);
  const std::int64_t filter =
      static_cast<std::int64_t>(group) * p.group_filters + first_filter + out_filter;
#pragma unroll
  for (int m = 0; m < kModels; ++m) {
    __syncthreads();  // the stages, or the other model's results, are read
#pragma unroll
    for (int r = 0; r < product.kRows; ++r) {
#pragma unroll
      for (int n = 0; n < product.kColumns; ++n) {
        const int at =
            (warp_pixel + 8 * n + lane % 4 * 2) * K::kStagedRow + warp_filter + 16 * r + lane / 4;
        staged[at] = product.sums[m][r][n][0];
        staged[at + K::kStagedRow] = product.sums[m][r][n][1];
        staged[at + 8] = product.sums[m][r][n][2];
        staged[at + K::kStagedRow + 8] = product.sums[m][r][n][3];
      }
    }
    __syncthreads();
    if (count <= 0) continue;
    const MaskedConvNhwcModel& model = p.models[m];
    float scale[8];
    float bias[8];
    conv_scale_and_bias(model, filter, count, scale, bias);
    for (int n = static_cast<int>(threadIdx.x) / kOutChunks; n < K::kPixels; n += kOutStep) {
      if (first_pixel + n >= p.pixels) break;
      const auto* const from =
          reinterpret_cast<const float4*>(staged + n * K::kStagedRow + out_filter);
      const float4 low = from[0];
      const float4 high = from[1];
      float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      conv_epilogue<T>(p, model, values, scale, bias,
                       static_cast<std::int64_t>(first_pixel + n) * p.filters + filter, count);
    }
  }
}

// ---------------------------------------------------------------------------- launches

Status to_status(cudaError_t error) {
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

template <typename T, typename K, int kModels, int kInputs, bool kVectorInput>
Status launch_kernel(const ConvProblem& p, int groups, void* stream) {
  const int filter_tiles = (p.group_filters + K::kFilters - 1) / K::kFilters;
  const std::int64_t blocks = static_cast<std::int64_t>(filter_tiles) * groups *
                              ((p.pixels + std::int64_t{K::kPixels} - 1) / K::kPixels);
  if (blocks > INT_MAX) return {"Expected a layer of fewer than 2^31 tiles"};
  const auto kernel = masked_conv_nhwc_kernel<T, K, kModels, kInputs, kVectorInput>;
  constexpr int kShared = K::shared_bytes(kInputs);
  static_assert(kShared <= 99 * 1024, "the smallest GPUs have no more");
  if (kShared > 48 * 1024) {  // more must be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return to_status(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(K::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, filter_tiles, groups);
  return to_status(error != cudaSuccess ? error : cudaGetLastError());
}

template <typename T, typename K, bool kVectorInput>
Status launch_tile(const ConvProblem& p, int groups, int model_count, void* stream) {
  if (model_count == 1) return launch_kernel<T, K, 1, 1, kVectorInput>(p, groups, stream);
  if (p.models[0].input == p.models[1].input) {
    return launch_kernel<T, K, 2, 1, kVectorInput>(p, groups, stream);
  }
  return launch_kernel<T, K, 2, 2, kVectorInput>(p, groups, stream);
}

// clang-format off
//            filters pixels depth  of a warp  stages  blocks
using Tile0 = Tile<128,   64,   32,   32, 32,      4,   2, 1>;
using Tile1 = Tile<64,    64,   32,   32, 32,      4,   4, 3>;
using Tile2 = Tile<64,   128,   32,   32, 32,      4,   2, 1>;
using Tile3 = Tile<32,    32,   64,   16, 16,      3,   5, 4>;
// clang-format on
using GeneralTile = Tile1;  // for inputs that are read element by element

template <typename K>
constexpr MaskedConvNhwcTile describe() {
  return {K::kFilters, K::kPixels,         K::kDepth,         K::kWarps,
          K::kStages,  K::shared_bytes(1), K::shared_bytes(2)};
}

template <typename T>
Status launch(const ConvProblem& p, int groups, int model_count, int tile, void* stream) {
  if (!p.vector_input) return launch_tile<T, GeneralTile, false>(p, groups, model_count, stream);
  switch (tile) {
    case 0:
      return launch_tile<T, Tile0, true>(p, groups, model_count, stream);
    case 1:
      return launch_tile<T, Tile1, true>(p, groups, model_count, stream);
    case 2:
      return launch_tile<T, Tile2, true>(p, groups, model_count, stream);
    default:
      return launch_tile<T, Tile3, true>(p, groups, model_count, stream);
  }
}

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

}  // namespace

MaskedConvNhwcTile masked_conv_nhwc_tile(int index) {
  constexpr MaskedConvNhwcTile kTiles[kMaskedConvNhwcTiles] = {
      describe<Tile0>(), describe<Tile1>(), describe<Tile2>(), describe<Tile3>()};
  return kTiles[index];
}

Status masked_conv_nhwc(const MaskedConvNhwcArgs& args, int tile, void* stream) {
  if (args.dtype != DType::kBFloat16 && args.dtype != DType::kFloat16) {
    return {"Expected bf16 or fp16"};
  }
  if (tile < 0 || tile >= kMaskedConvNhwcTiles) return {"Expected a tile that exists"};
  ConvProblem p{};
  std::int64_t taps = 1;
  std::int64_t pixels = args.images;
  std::int64_t input_pixels = 1;
  for (int d = 0; d < 3; ++d) {
    taps *= args.kernel[d];
    pixels *= args.output_size[d];
    input_pixels *= args.input_size[d];
    p.input_size[d] = static_cast<int>(args.input_size[d]);
    p.output_size[d] = static_cast<int>(args.output_size[d]);
    p.kernel[d] = static_cast<int>(args.kernel[d]);
    p.stride[d] = static_cast<int>(args.stride[d]);
    p.padding[d] = static_cast<int>(args.padding[d]);
    p.dilation[d] = static_cast<int>(args.dilation[d]);
  }
  if (pixels == 0 || args.filters == 0) return {};  // a launch of zero blocks is an error
  if (pixels > INT_MAX || input_pixels > INT_MAX || args.groups * args.channels > INT_MAX ||
      (args.filters + 128) * taps * args.channels > INT_MAX) {
    return {"Expected fewer than 2^31 output pixels, pixels of an image, and weights"};
  }
  p.weight = static_cast<const std::uint16_t*>(args.weight);
  p.activation = args.activation;
  p.pixel_elements = args.groups * args.channels;
  p.image_elements = input_pixels * p.pixel_elements;
  p.filters = args.filters;
  p.channels = static_cast<int>(args.channels);
  p.group_filters = static_cast<int>(args.filters / args.groups);
  p.taps = static_cast<int>(taps);
  p.words = (p.channels + 31) / 32;
  p.depth = p.taps * p.channels;
  p.pixels = static_cast<int>(pixels);
  // Without tensor cores all filters are alike, whatever group they are of.
  const bool depthwise = args.channels == 1;
  const std::int64_t input_run =
      depthwise && args.filters == args.groups ? args.filters : args.channels;
  p.vector_input = input_run % kVector == 0 && aligned(args.weight);
  p.vector_output = (depthwise ? args.filters : p.group_filters) % kVector == 0;
  for (int m = 0; m < args.model_count; ++m) {
    const MaskedConvNhwcModel& model = args.models[m];
    p.models[m] = model;
    p.vector_input = p.vector_input && aligned(model.input);
    p.vector_output = p.vector_output && aligned(model.output) && aligned(model.residual);
  }
  // The kernels spare the first model the work where it has no mask.
  if (args.model_count == 2 && p.models[1].mask == nullptr) std::swap(p.models[0], p.models[1]);
  if (depthwise) return masked_conv_nhwc_depthwise(p, args.dtype, args.model_count, stream);
  const int groups = static_cast<int>(args.groups);
  if (args.dtype == DType::kBFloat16) {
    return launch<BFloat16>(p, groups, args.model_count, tile, stream);
  }
  return launch<Float16>(p, groups, args.model_count, tile, stream);
}

}  // namespace fastpie::cuda
