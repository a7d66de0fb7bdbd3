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

#include "cuda/masked_conv_nhwc_tile.h"

namespace fastpie::cuda {
namespace {

template <typename T, typename K, int kModels, int kInputs>
struct Product {
  static constexpr int kRows = K::kWarpFilters / 16;
  static constexpr int kColumns = K::kWarpPixels / 8;

  float sums[kModels][kRows][kColumns][4] = {};

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
        if (kFirstMasked || m > 0) mask_fragment<kAt % 2>(bits[m], r, kAt / 2, a[m][r]);
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
  const ConvBlock block = ConvBlock::of<K>(filter_tiles, groups);

  auto* const stages = reinterpret_cast<std::uint16_t*>(conv_memory);
  constexpr int kStage = K::stage_elements(kInputs);
  Loader<T, K, kInputs, kVectorInput> loader(p, block);
  Product<T, K, kModels, kInputs> product;
  const int steps = (p.depth + K::kDepth - 1) / K::kDepth;
  const bool first_masked = p.models[0].mask != nullptr;

#pragma unroll
  for (int s = 0; s < K::kStages - 1; ++s) {
    if (s < steps) loader.load(stages + s * kStage);
    copy_async_commit();
  }
  MaskReader<K, kModels> reader(p, block, warp_filter, lane);
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
  write_results<T, K>(p, block, reinterpret_cast<float*>(conv_memory), warp_filter, warp_pixel,
                      product.sums);
}

// ---------------------------------------------------------------------------- launches

template <typename T, typename K, int kModels, int kInputs, bool kVectorInput>
Status launch_kernel(const ConvProblem& p, int groups, void* stream) {
  static_assert(K::shared_bytes(kInputs) <= 99 * 1024, "the smallest GPUs have no more");
  return launch_tiles<K, kInputs>(masked_conv_nhwc_kernel<T, K, kModels, kInputs, kVectorInput>, p,
                                  groups, stream);
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
constexpr int kTiles = 4;
using GeneralTile = Tile1;  // for inputs that are read element by element

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

int masked_conv_nhwc_tiles() { return kTiles + masked_conv_nhwc_hopper_tiles(); }

MaskedConvNhwcTile masked_conv_nhwc_tile(int index) {
  constexpr MaskedConvNhwcTile kDescribed[kTiles] = {describe<Tile0>(), describe<Tile1>(),
                                                     describe<Tile2>(), describe<Tile3>()};
  return index < kTiles ? kDescribed[index] : masked_conv_nhwc_hopper_tile(index - kTiles);
}

Status masked_conv_nhwc(const MaskedConvNhwcArgs& args, int tile, void* stream) {
  if (args.dtype != DType::kBFloat16 && args.dtype != DType::kFloat16) {
    return {"Expected bf16 or fp16"};
  }
  if (tile < 0 || tile >= masked_conv_nhwc_tiles()) return {"Expected a tile that exists"};
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
  if (tile >= kTiles && p.vector_input) {
    return masked_conv_nhwc_hopper(p, args.dtype, groups, args.model_count, tile - kTiles, stream);
  }
  if (args.dtype == DType::kBFloat16) {
    return launch<BFloat16>(p, groups, args.model_count, tile, stream);
  }
  return launch<Float16>(p, groups, args.model_count, tile, stream);
}

}  // namespace fastpie::cuda
