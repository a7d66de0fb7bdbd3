// masked_conv_nhwc on the tensor cores of Hopper, with the loader, the masks and the end of
// masked_conv_nhwc.cu. The products are `wgmma`, which run while the fragments of the next sixteen
// elements of depth are loaded and masked: A, the weights, comes from registers, and B, the
// activations, from shared memory, where the copies have put it in the order that is wanted there.
//
// The copies are `cp.async` and not those of the tensor memory accelerator: each thread knows the
// pixels of its own rows, whatever the stride, dilation and padding.
#include "cuda/masked_conv_nhwc_tile.h"
#include "cuda/wgmma.h"

namespace fastpie::cuda {
namespace {

// clang-format off
//            filters pixels depth  of a warp  stages  blocks
using Tile0 = Tile<128,  128,   64,   16, 128,     4,   1, 1>;
using Tile1 = Tile<64,    64,   64,   16,  64,     4,   3, 2>;
// clang-format on

#ifdef FASTPIE_WGMMA
extern __shared__ __align__(1024) unsigned char wgmma_memory[];

template <typename T, typename K, int kModels, int kInputs, bool kFirstMasked>
struct WarpgroupProduct {
  static constexpr int kSlices = K::kDepth / 16;

  float sums[kModels][1][K::kPixels / 8][4] = {};
  std::uint32_t a[kSlices][kModels][4];

  // Starts the products of sixteen elements of depth. Those that are under way then are of this
  // and the three slices before it: no slice is written while a product reads its registers.
  template <int kAt>
  __device__ __forceinline__ void start(const std::uint16_t* stage, int warp_filter, int lane,
                                        const MaskBits<K> (&bits)[kModels]) {
    wgmma_wait<kSlices - 1>();
    std::uint32_t raw[4];
    load_matrix_x4(raw, stage + swizzled<K::kDepth>(warp_filter + lane % 16, 2 * kAt + lane / 16));
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[kAt][m][i] = raw[i];
      if (kFirstMasked || m > 0) mask_fragment<kAt % 2>(bits[m], 0, kAt / 2, a[kAt][m]);
      wgmma_fragment(a[kAt][m]);
    }
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      const int input = kInputs == 1 ? 0 : m;
      const std::uint64_t b =
          wgmma_operand(stage + (K::kFilters + input * K::kPixels) * K::kDepth) + 2 * kAt;
      T::wgmma(sums[m][0], a[kAt][m], b);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kModels; ++m) wgmma_results(sums[m][0]);
  }
};
#endif

// Empty where there is no `wgmma`: `masked_conv_nhwc_hopper` is not called there. Whether the first
// model has a mask is compiled in: with a branch, the compiler lets no products go on side by side
// (ptxas C7513).
template <typename T, typename K, int kModels, int kInputs, bool kFirstMasked>
__global__ void __launch_bounds__(K::kThreads, kModels == 1 ? K::kBlocks : K::kDualBlocks)
    masked_conv_nhwc_hopper_kernel([[maybe_unused]] const ConvProblem p,
                                   [[maybe_unused]] int filter_tiles, [[maybe_unused]] int groups) {
#ifdef FASTPIE_WGMMA
  static_assert(K::kWarpFilters == 16 && K::kWarpPixels == K::kPixels && K::kFilters % 64 == 0,
                "a warpgroup has 64 filters and all pixels");
  static_assert(K::kDepth == 64, "rows of 128 bytes");
  // While a step is computed, products may still read the one before it.
  constexpr int kAhead = K::kStages - 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_filter = static_cast<int>(threadIdx.x) / kWarp * K::kWarpFilters;
  const ConvBlock block = ConvBlock::of<K>(filter_tiles, groups);

  auto* const stages = reinterpret_cast<std::uint16_t*>(wgmma_memory);
  constexpr int kStage = K::stage_elements(kInputs);
  Loader<T, K, kInputs, true> loader(p, block);
  WarpgroupProduct<T, K, kModels, kInputs, kFirstMasked> product;
  const int steps = (p.depth + K::kDepth - 1) / K::kDepth;

#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < steps) loader.load(stages + s * kStage);
    copy_async_commit();
  }
  MaskReader<K, kModels> reader(p, block, warp_filter, lane);
  MaskBits<K> bits[kModels];
  MaskBits<K> next[kModels];
  reader.next(next);

  int stage = 0;
  int free_stage = kAhead;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kAhead - 1>();
    fence_for_products();
    __syncthreads();  // this step has arrived for all, and all have left the last step but one
    if (step + kAhead < steps) loader.load(stages + free_stage * kStage);
    copy_async_commit();
#pragma unroll
    for (int m = 0; m < kModels; ++m) bits[m] = next[m];
    reader.next(next);
    const std::uint16_t* const now = stages + stage * kStage;
    product.template start<0>(now, warp_filter, lane, bits);
    product.template start<1>(now, warp_filter, lane, bits);
    product.template start<2>(now, warp_filter, lane, bits);
    product.template start<3>(now, warp_filter, lane, bits);
    stage = stage + 1 == K::kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == K::kStages ? 0 : free_stage + 1;
  }
  copy_async_wait<0>();
  product.finish();
  write_results<T, K>(p, block, reinterpret_cast<float*>(wgmma_memory), warp_filter, 0,
                      product.sums);
#endif
}

template <typename T, typename K, int kModels, int kInputs>
Status launch_kernel(const ConvProblem& p, int groups, void* stream) {
  static_assert(K::shared_bytes(kInputs) <= 227 * 1024, "a block has no more");
  const auto kernel = p.models[0].mask != nullptr
                          ? masked_conv_nhwc_hopper_kernel<T, K, kModels, kInputs, true>
                          : masked_conv_nhwc_hopper_kernel<T, K, kModels, kInputs, false>;
  return launch_tiles<K, kInputs>(kernel, p, groups, stream);
}

template <typename T, typename K>
Status launch_tile(const ConvProblem& p, int groups, int model_count, void* stream) {
  if (model_count == 1) return launch_kernel<T, K, 1, 1>(p, groups, stream);
  if (p.models[0].input == p.models[1].input) {
    return launch_kernel<T, K, 2, 1>(p, groups, stream);
  }
  return launch_kernel<T, K, 2, 2>(p, groups, stream);
}

template <typename T>
Status launch(const ConvProblem& p, int groups, int model_count, int tile, void* stream) {
  if (tile == 0) return launch_tile<T, Tile0>(p, groups, model_count, stream);
  return launch_tile<T, Tile1>(p, groups, model_count, stream);
}

}  // namespace

int masked_conv_nhwc_hopper_tiles() {
  int device = 0;
  int major = 0;
  int minor = 0;
  // Code for sm_90a runs on nothing else.
  const bool hopper =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      major == 9 && minor == 0;
  return hopper ? 2 : 0;
}

MaskedConvNhwcTile masked_conv_nhwc_hopper_tile(int index) {
  return index == 0 ? describe<Tile0>() : describe<Tile1>();
}

Status masked_conv_nhwc_hopper(const ConvProblem& p, DType dtype, int groups, int model_count,
                               int tile, void* stream) {
  if (dtype == DType::kBFloat16) return launch<BFloat16>(p, groups, model_count, tile, stream);
  return launch<Float16>(p, groups, model_count, tile, stream);
}

}  // namespace fastpie::cuda
