// CUDA kernel of `sparse24_conv`: an implicit GEMM on sparse tensor cores.
//
// Filters are rows of the product and come as operand A, packed; pixels are its columns and come as
// operand B, whose depth (one tap's channels) is contiguous in channels-last tensors. A block
// computes one tile of filters for kPixels pixels. It walks through the steps of the weight's own
// columns, 32 each, copied 16 bytes at a time by cp.async, kSteps of them in each of kStages
// stages.
//
// Extra columns are never read from global memory: an element a line would cost a sector each, and
// tags of the L1 cache that a step's products do not hide. While a stage is in shared memory, the
// columns of it that are repeated are copied to where the extra steps are put together. The packing
// sees to it that two of them are open at a time; the older one is multiplied when a third begins,
// its weights read from the L2 cache.
//
// Shared memory of a step: values and metadata as they are packed, one contiguous copy, and a line
// of 64 bytes for each pixel, whose four chunks of 16 bytes change places with the pixel so that
// eight lines of one chunk (ldmatrix) lie in 32 different banks.
//
// Each warp has 64 filters and 32 pixels: 4 x 4 products of 16 x 8 a step, for which it reads 2 KiB
// of A and 2 KiB of B from shared memory.
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/activation.h"
#include "cuda/half.h"
#include "cuda/mma.h"
#include "fastpie/sparse24.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kStep = static_cast<int>(kSparse24Step);
constexpr int kWarpRows = 64;
constexpr int kWarpPixels = 32;
constexpr int kSteps = 2;
constexpr int kStages = 3;
constexpr int kChunk = 8;  // elements in 16 bytes
constexpr int kChunks = kStep / kChunk;
constexpr int kMaxTaps = 256;
constexpr int kMaxExtent = 1 << 29;        // pixels
constexpr int kNowhere = -2 * kMaxExtent;  // a coordinate that no tap brings into the image

template <typename Half, int kSelector>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const std::uint32_t (&a)[4],
                                           const std::uint32_t (&b)[4], std::uint32_t metadata) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    mma_sparse_bf16<kSelector>(d, a, b, metadata);
  } else {
    mma_sparse_fp16<kSelector>(d, a, b, metadata);
  }
}

template <int kRows, int kPixels>
struct Tile {
  static constexpr int kThreads = kRows / kWarpRows * (kPixels / kWarpPixels) * kWarp;
  static constexpr int kLoads = kPixels * kChunks / kThreads;  // of a thread, in a step of input
  static constexpr int kPixelStep = kThreads / kChunks;
  static constexpr int kValueBytes = kRows * kStep;  // half of the columns, 2 bytes each
  static constexpr int kMetadataBytes = kRows * 4;
  static constexpr int kInputBytes = kPixels * kStep * 2;
  static constexpr int kStepBytes = kValueBytes + kMetadataBytes + kInputBytes;
  static constexpr int kStageBytes = kSteps * kStepBytes;
  // Sums on their way to the output, fp32: with 4 more than kRows from pixel to pixel the 32 lanes
  // that hold 8 filters of 4 pairs of pixels write to 32 banks.
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kSumBytes = kPixels * kSumPitch * 4;
  static constexpr int kExtraBytes = 2 * kInputBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes + kExtraBytes;
  static constexpr int kBytes = kPipelineBytes > kSumBytes ? kPipelineBytes : kSumBytes;

  static_assert(kBytes <= 91 * 1024, "with 8 KiB of pixels and taps what the smallest GPUs have");
};

// Where a tap reads, from the pixel that the first tap reads: elements, and coordinates.
struct alignas(16) Tap {
  std::int32_t offset, z, y, x;
};

// What the first tap reads for a pixel of the output: elements from the start of the input, which
// may be before an image, and coordinates.
struct alignas(16) Pixel {
  std::int64_t offset;
  int z, y, x;
};

__device__ Pixel pixel_at(const Sparse24ConvArgs& args, std::int64_t index, std::int64_t count) {
  if (index >= count) return {0, kNowhere, kNowhere, kNowhere};
  const std::int64_t* const size = args.input_size;
  const std::int64_t* const out = args.output_size;
  const std::int64_t line = index / out[2], slice = line / out[1], image = slice / out[0];
  const std::int64_t z = (slice - image * out[0]) * args.stride[0] - args.padding[0];
  const std::int64_t y = (line - slice * out[1]) * args.stride[1] - args.padding[1];
  const std::int64_t x = (index - line * out[2]) * args.stride[2] - args.padding[2];
  return {(((image * size[0] + z) * size[1] + y) * size[2] + x) * args.channels,
          static_cast<int>(z), static_cast<int>(y), static_cast<int>(x)};
}

// Where chunk `chunk` of a pixel lies in the input of a step.
__device__ __forceinline__ int place_of(int pixel, int chunk) {
  return pixel * (2 * kStep) + (chunk ^ (pixel / 2 % kChunks)) * 16;
}

// Brings stages into shared memory. Thread i has chunk i % 4 of the pixels i / 4, + kPixelStep, ...
template <int kRows, int kPixels>
struct Loader {
  using T = Tile<kRows, kPixels>;

  const Sparse24ConvArgs& args;
  const Pixel* pixels;  // shared, as the next
  const Tap* taps;
  std::int64_t first;  // step of the tile
  int steps;           // without the extra ones

  __device__ bool inside(const Pixel& pixel, const Tap& tap) const {
    return static_cast<unsigned>(pixel.z + tap.z) < static_cast<unsigned>(args.input_size[0]) &&
           static_cast<unsigned>(pixel.y + tap.y) < static_cast<unsigned>(args.input_size[1]) &&
           static_cast<unsigned>(pixel.x + tap.x) < static_cast<unsigned>(args.input_size[2]);
  }

  __device__ void load_weight(unsigned char* shared, int step) const {
    const std::int64_t at = first + step;
    const auto copy = [&](const void* source, int bytes) {
      const auto* const from = static_cast<const unsigned char*>(source) + at * bytes;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += T::kThreads * 16) {
        copy_async_16(shared + i, from + i, 16);
      }
      shared += bytes;
    };
    copy(args.values, T::kValueBytes);
    copy(args.metadata, T::kMetadataBytes);
  }

  __device__ void load_input(unsigned char* shared, int step) const {
    const auto column = static_cast<unsigned>(step) * kStep;
    const auto channels = static_cast<unsigned>(args.channels);
    const Tap tap = taps[column / channels];
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const auto* const input = static_cast<const std::uint16_t*>(args.input) + column % channels +
                              chunk * kChunk + tap.offset;
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int pixel = static_cast<int>(threadIdx.x) / kChunks + i * T::kPixelStep;
      const Pixel at = pixels[pixel];
      const bool valid = inside(at, tap);
      const void* const from = input + at.offset;
      copy_async_16(shared + place_of(pixel, chunk), valid ? from : args.values, valid ? 16 : 0);
    }
  }

  // Starts the steps of a stage, if there are any, as one group of copies.
  __device__ void load(unsigned char* shared, int stage) const {
    shared += stage % kStages * T::kStageBytes;
    for (int step = stage * kSteps; step < steps && step < (stage + 1) * kSteps; ++step) {
      load_weight(shared, step);
      load_input(shared + T::kValueBytes + T::kMetadataBytes, step);
      shared += T::kStepBytes;
    }
    copy_async_commit();
  }
};

// The part of a warp: 64 filters and 32 pixels.
template <typename Half>
struct WarpProduct {
  int row, pixel, lane;  // the first of each in the tile
  float sums[4][4][4];
  std::uint32_t a[4][4], metadata[2];

  // The weights of a step, from global or shared memory.
  __device__ __forceinline__ void read_weight(const void* values, const std::uint32_t* words) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const uint4 four = static_cast<const uint4*>(values)[(row / 16 + m) * kWarp + lane];
      a[m][0] = four.x;
      a[m][1] = four.y;
      a[m][2] = four.z;
      a[m][3] = four.w;
    }
    metadata[0] = words[row / 32 * kWarp + lane];
    metadata[1] = words[(row / 32 + 1) * kWarp + lane];
  }

  __device__ __forceinline__ void multiply(const unsigned char* input) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t b[4];
      load_matrix_x4(b, input + place_of(pixel + n * 8 + lane % 8, lane / 8));
      mma_sparse<Half, 0>(sums[0][n], a[0], b, metadata[0]);
      mma_sparse<Half, 1>(sums[1][n], a[1], b, metadata[0]);
      mma_sparse<Half, 0>(sums[2][n], a[2], b, metadata[1]);
      mma_sparse<Half, 1>(sums[3][n], a[3], b, metadata[1]);
    }
  }
};

// The extra steps of a tile.
template <typename Half, int kRows, int kPixels>
struct Extras {
  using T = Tile<kRows, kPixels>;

  const Sparse24ConvArgs& args;
  std::int64_t first;  // extra step of the tile
  const int2* copies;  // (column, slot)
  int copy_count;
  int step_count;
  unsigned char* shared;  // two steps of input
  int next = 0;           // copy
  int step = 0;           // the older of the two that are open

  // Copies the columns up to `end`, of which those of the last kSteps steps are at `stage`, and
  // multiplies what they complete; where they are the `last`, all that is left.
  __device__ void take(const unsigned char* stage, int end, bool last, WarpProduct<Half>& product) {
    for (;;) {
      // Each warp reads the same 32 copies and takes those of the two steps.
      const int index = next + product.lane;
      const int2 copy = index < copy_count ? __ldg(copies + index) : make_int2(end, 0);
      const bool ready = copy.x < end && copy.y / kStep <= step + 1;
      const unsigned others = __ballot_sync(0xffffffffu, !ready);
      const int count = others == 0 ? kWarp : __ffs(static_cast<int>(others)) - 1;
      copy_columns(stage, copy, count, product.lane);
      next += count;
      if (count == kWarp) continue;
      const bool blocked = __shfl_sync(0xffffffffu, copy.x, count) < end;
      if (!blocked && !(last && step < step_count)) return;
      multiply(product);
    }
  }

  // Four columns of eight pixels at a time.
  __device__ void copy_columns(const unsigned char* stage, const int2& copy, int count, int lane) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int i = 0; i < count; i += 4) {
      const int index = i + lane / 8;  // below 32, since `i` is a multiple of 4
      const int column = __shfl_sync(0xffffffffu, copy.x, index);
      const int slot = __shfl_sync(0xffffffffu, copy.y, index);
      if (index >= count) continue;
      const unsigned char* const from = stage + column / kStep % kSteps * T::kStepBytes +
                                        T::kValueBytes + T::kMetadataBytes + column % kChunk * 2;
      unsigned char* const to = shared + slot / kStep % 2 * T::kInputBytes + slot % kChunk * 2;
#pragma unroll
      for (int pixel = warp * 8 + lane % 8; pixel < kPixels; pixel += T::kThreads / 4) {
        *reinterpret_cast<std::uint16_t*>(to + place_of(pixel, slot % kStep / kChunk)) =
            *reinterpret_cast<const std::uint16_t*>(from +
                                                    place_of(pixel, column % kStep / kChunk));
      }
    }
  }

  __device__ void multiply(WarpProduct<Half>& product) {
    const std::int64_t at = first + step;
    product.read_weight(static_cast<const unsigned char*>(args.values) + at * T::kValueBytes,
                        args.metadata + at * kRows);
    __syncthreads();  // what other warps have copied
    product.multiply(shared + step % 2 * T::kInputBytes);
    __syncthreads();  // before it is written again
    ++step;
  }
};

// Scale and bias, on the way to shared memory as [pixel][filter].
template <int kRows, int kPixels, typename Half>
__device__ __forceinline__ void put_sums(const Sparse24ConvArgs& args, float* out,
                                         const WarpProduct<Half>& product, std::int64_t filter) {
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const int row = product.row + m * 8 + product.lane / 4;
    const std::int64_t k = filter + row;
    const bool exists = k < args.filters;
    const float scale = args.scale != nullptr && exists ? __ldg(args.scale + k) : 1.0f;
    const float bias = args.bias != nullptr && exists ? __ldg(args.bias + k) : 0.0f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pixel = product.pixel + n * 8 + product.lane % 4 * 2 + i;
        out[pixel * Tile<kRows, kPixels>::kSumPitch + row] =
            scale * product.sums[m / 2][n][m % 2 * 2 + i] + bias;
      }
    }
  }
}

// Residual and activation, on the way to the output, eight filters at a time.
template <typename Half, int kRows, int kPixels>
__device__ __forceinline__ void write_output(const Sparse24ConvArgs& args, const float* sums,
                                             std::int64_t filter, std::int64_t first_pixel,
                                             std::int64_t count, bool aligned) {
  using T = Tile<kRows, kPixels>;
  const auto* const residual = static_cast<const std::uint16_t*>(args.residual);
  auto* const output = static_cast<std::uint16_t*>(args.output);
  constexpr int kAcross = kRows / kChunk;
  for (int i = static_cast<int>(threadIdx.x); i < kPixels * kAcross; i += T::kThreads) {
    const std::int64_t pixel = first_pixel + i / kAcross;
    const std::int64_t k = filter + i % kAcross * kChunk;
    if (pixel >= count || k >= args.filters) continue;
    const float* const from = sums + i / kAcross * T::kSumPitch + i % kAcross * kChunk;
    const std::int64_t at = pixel * args.filters + k;
    const int valid = args.filters - k < kChunk ? static_cast<int>(args.filters - k) : kChunk;
    float values[kChunk], added[kChunk] = {};
    if (residual != nullptr && aligned) {
      unpack_8<Half>(__ldg(reinterpret_cast<const uint4*>(residual + at)), added);
    } else if (residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < valid) added[j] = Half::low(__ldg(residual + at + j));
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      values[j] = activate(residual != nullptr ? from[j] + added[j] : from[j], args.activation);
    }
    if (aligned) {
      *reinterpret_cast<uint4*>(output + at) = pack_8<Half>(values);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < valid) output[at + j] = static_cast<std::uint16_t>(Half::pack(values[j], 0.0f));
      }
    }
  }
}

template <typename Half, int kRows, int kPixels>
__global__ void __launch_bounds__(Tile<kRows, kPixels>::kThreads, 2)
    sparse24_conv_kernel(const Sparse24ConvArgs args, int tiles, std::int64_t count, bool aligned) {
  using T = Tile<kRows, kPixels>;
  extern __shared__ __align__(16) unsigned char shared[];
  Pixel* const pixels = reinterpret_cast<Pixel*>(shared + T::kBytes);
  Tap* const taps = reinterpret_cast<Tap*>(pixels + kPixels);

  // Blocks that follow each other have the same pixels: their input is in the L2 cache.
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles));
  const std::int64_t first_pixel =
      std::int64_t{blockIdx.x / static_cast<unsigned>(tiles)} * kPixels;
  const std::int64_t filter = std::int64_t{tile} * kRows;

  const int width = static_cast<int>(args.kernel[2]), height = static_cast<int>(args.kernel[1]);
  const int tap_count = static_cast<int>(args.kernel[0]) * height * width;
  for (int t = static_cast<int>(threadIdx.x); t < tap_count; t += T::kThreads) {
    const std::int64_t z = t / width / height * args.dilation[0];
    const std::int64_t y = t / width % height * args.dilation[1];
    const std::int64_t x = t % width * args.dilation[2];
    const std::int64_t offset =
        ((z * args.input_size[1] + y) * args.input_size[2] + x) * args.channels;
    taps[t] = {static_cast<std::int32_t>(offset), static_cast<std::int32_t>(z),
               static_cast<std::int32_t>(y), static_cast<std::int32_t>(x)};
  }

  for (int i = static_cast<int>(threadIdx.x) * 16; i < T::kExtraBytes; i += T::kThreads * 16) {
    // Empty columns meet weights of 0, which NaN would survive.
    *reinterpret_cast<uint4*>(shared + kStages * T::kStageBytes + i) = make_uint4(0, 0, 0, 0);
  }

  const int steps = static_cast<int>(tap_count * args.channels / kStep);
  const std::int64_t first = args.step_begin[tile];
  const Loader<kRows, kPixels> loader{args, pixels, taps, first, steps};
  for (int i = static_cast<int>(threadIdx.x); i < kPixels; i += T::kThreads) {
    pixels[i] = pixel_at(args, first_pixel + i, count);
  }
  __syncthreads();  // pixels, taps and zeros

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  WarpProduct<Half> product{};
  product.row = warp % (kRows / kWarpRows) * kWarpRows;
  product.pixel = warp / (kRows / kWarpRows) * kWarpPixels;
  product.lane = lane;
  const std::int64_t first_copy = args.copy_begin[tile];
  Extras<Half, kRows, kPixels> extras{args,
                                      first + steps,
                                      reinterpret_cast<const int2*>(args.copies) + first_copy,
                                      static_cast<int>(args.copy_begin[tile + 1] - first_copy),
                                      static_cast<int>(args.step_begin[tile + 1] - first) - steps,
                                      shared + kStages * T::kStageBytes};
  for (int stage = 0; stage < kStages - 1; ++stage) loader.load(shared, stage);
  for (int stage = 0; stage * kSteps < steps; ++stage) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage is here, and the one before is no longer read
    loader.load(shared, stage + kStages - 1);
    const unsigned char* const now = shared + stage % kStages * T::kStageBytes;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (stage * kSteps + i >= steps) break;
      const unsigned char* const weight = now + i * T::kStepBytes;
      const unsigned char* const metadata = weight + T::kValueBytes;
      product.read_weight(weight, reinterpret_cast<const std::uint32_t*>(metadata));
      product.multiply(metadata + T::kMetadataBytes);
    }
    extras.take(now, (stage + 1) * kSteps * kStep, (stage + 1) * kSteps >= steps, product);
  }

  copy_async_wait<0>();
  __syncthreads();
  float* const results = reinterpret_cast<float*>(shared);
  put_sums<kRows, kPixels>(args, results, product, filter);
  __syncthreads();
  write_output<Half, kRows, kPixels>(args, results, filter, first_pixel, count, aligned);
}

bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

template <typename Half, int kRows, int kPixels>
Status launch(const Sparse24ConvArgs& args, std::int64_t count, std::int64_t taps, void* stream) {
  using T = Tile<kRows, kPixels>;
  const std::int64_t tiles = (args.filters + kRows - 1) / kRows;
  const std::int64_t blocks = (count + kPixels - 1) / kPixels * tiles;
  if (blocks > INT_MAX) return {"Expected fewer than 2^31 blocks of output"};
  const std::size_t bytes =
      T::kBytes + kPixels * sizeof(Pixel) + static_cast<std::size_t>(taps) * sizeof(Tap);
  cudaError_t error =
      cudaFuncSetAttribute(sparse24_conv_kernel<Half, kRows, kPixels>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  const bool aligned =
      args.filters % kChunk == 0 && is_aligned(args.output) && is_aligned(args.residual);
  sparse24_conv_kernel<Half, kRows, kPixels>
      <<<static_cast<unsigned>(blocks), T::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
          args, static_cast<int>(tiles), count, aligned);
  error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

template <typename Half>
Status launch(const Sparse24ConvArgs& args, std::int64_t count, std::int64_t taps, void* stream) {
  std::int64_t pixels = args.tile_pixels;
  if (pixels == 0) {  // small tiles where large ones leave multiprocessors without work
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) return {cudaGetErrorString(error)};
    const std::int64_t tiles = (args.filters + args.rows - 1) / args.rows;
    pixels = (count + 127) / 128 * tiles < processors ? 64 : 128;
  }
  if (args.rows == 64) {
    return pixels == 64 ? launch<Half, 64, 64>(args, count, taps, stream)
                        : launch<Half, 64, 128>(args, count, taps, stream);
  }
  return pixels == 64 ? launch<Half, 128, 64>(args, count, taps, stream)
                      : launch<Half, 128, 128>(args, count, taps, stream);
}

}  // namespace

Status sparse24_conv(const Sparse24ConvArgs& args, void* stream) {
  std::int64_t taps = 1;
  for (const std::int64_t size : args.kernel) taps = size <= kMaxTaps ? taps * size : kMaxTaps + 1;
  const std::int64_t count =
      args.images * args.output_size[0] * args.output_size[1] * args.output_size[2];
  if (args.dtype == DType::kFloat32) return {"Expected bf16 or fp16"};
  if (args.channels < kStep || args.channels % kStep != 0) {
    return {"Expected channels to be a multiple of 32"};
  }
  if (args.rows != 64 && args.rows != 128) return {"Expected tiles of 64 or 128 rows"};
  if (args.tile_pixels != 0 && args.tile_pixels != 64 && args.tile_pixels != 128) {
    return {"Expected tiles of 64 or 128 pixels, or 0 for a default"};
  }
  if (taps < 1 || taps > kMaxTaps) return {"Expected a kernel of 1 to 256 taps"};
  std::int64_t image = args.channels, extent[3];
  for (int d = 0; d < 3; ++d) {
    if (args.input_size[d] > 0 && image > INT_MAX / args.input_size[d]) {
      return {"Expected an image to have < 2^31 elements"};
    }
    image *= args.input_size[d];
    // Coordinates of taps are 32 bits wide, also of those outside the image.
    extent[d] = args.dilation[d] * (args.kernel[d] - 1);
    if (extent[d] > kMaxExtent || args.output_size[d] > kMaxExtent / args.stride[d]) {
      return {"Expected output and window to span < 2^30 pixels"};
    }
  }
  if (((extent[0] * args.input_size[1] + extent[1]) * args.input_size[2] + extent[2]) *
          args.channels >
      INT_MAX) {
    return {"Expected the window to span < 2^31 elements"};
  }
  if (!is_aligned(args.input) || !is_aligned(args.values) || !is_aligned(args.metadata)) {
    return {"Expected input and packed weight to be aligned to 16 bytes"};
  }
  if (count == 0 || args.filters == 0) return {};
  return args.dtype == DType::kBFloat16 ? launch<BFloat16>(args, count, taps, stream)
                                        : launch<Float16>(args, count, taps, stream);
}

}  // namespace fastpie::cuda
