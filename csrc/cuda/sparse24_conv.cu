// CUDA kernel of `sparse24_conv`: an implicit GEMM on sparse tensor cores.
//
// Filters are rows of the product and come as operand A, packed; pixels are its columns and come as
// operand B, whose depth (one tap's channels) is contiguous in channels-last tensors. A block
// computes one tile of filters for kPixels pixels. It walks through the steps of its tile, 32
// columns each: the weight's own, copied 16 bytes at a time by cp.async, kSteps of them in each of
// kStages stages, then the extra columns, gathered element by element.
//
// Shared memory of a step: values and metadata as they are packed, one contiguous copy, and a line
// of 64 bytes for each pixel, whose four chunks of 16 bytes change places with the pixel so that
// eight lines of one chunk (ldmatrix) lie in 32 different banks.
//
// Each warp has 64 filters and 32 pixels: 4 x 4 products of 16 x 8 a step, for which it reads 2 KiB
// of A and 2 KiB of B from shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/activation.h"
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
constexpr int kMaxTaps = 512;
constexpr int kMaxExtent = 1 << 29;        // pixels
constexpr int kNowhere = -2 * kMaxExtent;  // a coordinate that no tap brings into the image

struct BFloat16 {
  __device__ static float to_float(std::uint32_t bits) { return __uint_as_float(bits << 16); }
  __device__ static std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }
  template <int kSelector>
  __device__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[4], std::uint32_t metadata) {
    mma_sparse_bf16<kSelector>(d, a, b, metadata);
  }
};

struct Float16 {
  __device__ static float to_float(std::uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  __device__ static std::uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }
  template <int kSelector>
  __device__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[4], std::uint32_t metadata) {
    mma_sparse_fp16<kSelector>(d, a, b, metadata);
  }
};

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
  static constexpr int kBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
};

// Where a tap reads, from the pixel that the first tap reads: elements, and coordinates.
struct alignas(16) Tap {
  std::int32_t offset, z, y, x;
};

// What the first tap reads for a pixel of the output: elements from the start of the input, which
// may be before an image, and coordinates.
struct Pixel {
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

// Brings steps into shared memory. Thread i has chunk i % 4 of the pixels i / 4, + kPixelStep, ...
template <int kRows, int kPixels>
struct Loader {
  using T = Tile<kRows, kPixels>;

  const Sparse24ConvArgs& args;
  const Tap* taps;            // shared
  std::int64_t first;         // step of the tile
  std::int64_t extra_source;  // of its first extra step
  int main_steps, steps;
  Pixel pixels[T::kLoads];

  __device__ bool inside(const Pixel& pixel, const Tap& tap) const {
    return static_cast<unsigned>(pixel.z + tap.z) < static_cast<unsigned>(args.input_size[0]) &&
           static_cast<unsigned>(pixel.y + tap.y) < static_cast<unsigned>(args.input_size[1]) &&
           static_cast<unsigned>(pixel.x + tap.x) < static_cast<unsigned>(args.input_size[2]);
  }

  __device__ static unsigned char* line(unsigned char* input, int index) {
    const int pixel = static_cast<int>(threadIdx.x) / kChunks + index * T::kPixelStep;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    return input + pixel * (2 * kStep) + (chunk ^ (pixel / 2 % kChunks)) * 16;
  }

  __device__ void load_weight(unsigned char* shared, int step) const {
    const std::int64_t at = first + step;
    const auto copy = [&](const void* source, int bytes) {
      const auto* const from = static_cast<const unsigned char*>(source) + at * bytes;
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
    const int channel =
        static_cast<int>(column % channels + threadIdx.x % kChunks * unsigned{kChunk});
    const auto* const input = static_cast<const std::uint16_t*>(args.input);
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const bool valid = inside(pixels[i], tap);
      const void* const from = input + pixels[i].offset + tap.offset + channel;
      copy_async_16(line(shared, i), valid ? from : args.values, valid ? 16 : 0);
    }
  }

  __device__ void gather_input(unsigned char* shared, int step) const {
    const auto* const source =
        reinterpret_cast<const int4*>(args.source + (extra_source + step - main_steps) * kStep +
                                      threadIdx.x % kChunks * unsigned{kChunk});
    const int4 low = __ldg(source), high = __ldg(source + 1);
    const int columns[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const auto* const input = static_cast<const std::uint16_t*>(args.input);
    std::uint32_t words[T::kLoads][kChunk / 2] = {};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (columns[j] < 0) continue;
      const auto column = static_cast<unsigned>(columns[j]);
      const auto channels = static_cast<unsigned>(args.channels);
      const Tap tap = taps[column / channels];
      const int channel = static_cast<int>(column % channels);
#pragma unroll
      for (int i = 0; i < T::kLoads; ++i) {
        if (!inside(pixels[i], tap)) continue;
        const std::uint32_t bits = __ldg(input + pixels[i].offset + tap.offset + channel);
        words[i][j / 2] |= bits << (16 * (j % 2));
      }
    }
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      *reinterpret_cast<uint4*>(line(shared, i)) =
          make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
    }
  }

  // Starts the steps of a stage, if there are any, as one group of copies.
  __device__ void load(unsigned char* shared, int stage) const {
    shared += stage % kStages * T::kStageBytes;
    for (int step = stage * kSteps; step < steps && step < (stage + 1) * kSteps; ++step) {
      load_weight(shared, step);
      unsigned char* const input = shared + T::kValueBytes + T::kMetadataBytes;
      if (step < main_steps) {
        load_input(input, step);
      } else {
        gather_input(input, step);
      }
      shared += T::kStepBytes;
    }
    copy_async_commit();
  }
};

// One step of the warp's 64 filters and 32 pixels.
template <typename Half, int kRows, int kPixels>
__device__ __forceinline__ void multiply(float (&sums)[4][4][4], const unsigned char* shared,
                                         int warp_row, int warp_pixel, int lane) {
  using T = Tile<kRows, kPixels>;
  const auto* const values = reinterpret_cast<const uint4*>(shared);
  const auto* const metadata = reinterpret_cast<const std::uint32_t*>(shared + T::kValueBytes);
  const unsigned char* const input = shared + T::kValueBytes + T::kMetadataBytes;
  std::uint32_t a[4][4], meta[2];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const uint4 words = values[(warp_row / 16 + m) * kWarp + lane];
    a[m][0] = words.x;
    a[m][1] = words.y;
    a[m][2] = words.z;
    a[m][3] = words.w;
  }
  meta[0] = metadata[warp_row / 32 * kWarp + lane];
  meta[1] = metadata[(warp_row / 32 + 1) * kWarp + lane];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int pixel = warp_pixel + n * 8 + lane % 8;
    std::uint32_t b[4];
    load_matrix_x4(b, input + pixel * (2 * kStep) + (lane / 8 ^ pixel / 2 % kChunks) * 16);
    Half::template mma<0>(sums[0][n], a[0], b, meta[0]);
    Half::template mma<1>(sums[1][n], a[1], b, meta[0]);
    Half::template mma<0>(sums[2][n], a[2], b, meta[1]);
    Half::template mma<1>(sums[3][n], a[3], b, meta[1]);
  }
}

// Scale and bias, on the way to shared memory as [pixel][filter].
template <int kRows, int kPixels>
__device__ __forceinline__ void put_sums(const Sparse24ConvArgs& args, float* out,
                                         const float (&sums)[4][4][4], std::int64_t filter,
                                         int warp_row, int warp_pixel, int lane) {
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const int row = warp_row + m * 8 + lane / 4;
    const std::int64_t k = filter + row;
    const bool exists = k < args.filters;
    const float scale = args.scale != nullptr && exists ? __ldg(args.scale + k) : 1.0f;
    const float bias = args.bias != nullptr && exists ? __ldg(args.bias + k) : 0.0f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pixel = warp_pixel + n * 8 + lane % 4 * 2 + i;
        out[pixel * Tile<kRows, kPixels>::kSumPitch + row] =
            scale * sums[m / 2][n][m % 2 * 2 + i] + bias;
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
    std::uint32_t words[kChunk / 2] = {};
    if (residual != nullptr && aligned) {
      const uint4 read = __ldg(reinterpret_cast<const uint4*>(residual + at));
      words[0] = read.x;
      words[1] = read.y;
      words[2] = read.z;
      words[3] = read.w;
    } else if (residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < valid) words[j / 2] |= std::uint32_t{__ldg(residual + at + j)} << (16 * (j % 2));
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk; j += 2) {
      float low = from[j], high = from[j + 1];
      if (residual != nullptr) {
        low += Half::to_float(words[j / 2] & 0xffffu);
        high += Half::to_float(words[j / 2] >> 16);
      }
      words[j / 2] = Half::pack(activate(low, args.activation), activate(high, args.activation));
    }
    if (aligned) {
      *reinterpret_cast<uint4*>(output + at) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < valid) output[at + j] = static_cast<std::uint16_t>(words[j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

template <typename Half, int kRows, int kPixels>
__global__ void __launch_bounds__(Tile<kRows, kPixels>::kThreads)
    sparse24_conv_kernel(const Sparse24ConvArgs args, int tiles, std::int64_t count, bool aligned) {
  using T = Tile<kRows, kPixels>;
  extern __shared__ __align__(16) unsigned char shared[];
  Tap* const taps = reinterpret_cast<Tap*>(shared + T::kBytes);

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

  const int main_steps = static_cast<int>(tap_count * args.channels / kStep);
  const std::int64_t first = args.step_begin[tile];
  Loader<kRows, kPixels> loader{args,       taps,
                                first,      first - std::int64_t{tile} * main_steps,
                                main_steps, static_cast<int>(args.step_begin[tile + 1] - first),
                                {}};
#pragma unroll
  for (int i = 0; i < T::kLoads; ++i) {
    const int pixel = static_cast<int>(threadIdx.x) / kChunks + i * T::kPixelStep;
    loader.pixels[i] = pixel_at(args, first_pixel + pixel, count);
  }
  __syncthreads();  // the taps

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp % (kRows / kWarpRows) * kWarpRows;
  const int warp_pixel = warp / (kRows / kWarpRows) * kWarpPixels;
  float sums[4][4][4] = {};
  const int stages = (loader.steps + kSteps - 1) / kSteps;
  for (int stage = 0; stage < kStages - 1; ++stage) loader.load(shared, stage);
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage is here, and the one before is no longer read
    loader.load(shared, stage + kStages - 1);
    const unsigned char* const now = shared + stage % kStages * T::kStageBytes;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (stage * kSteps + i < loader.steps) {
        multiply<Half, kRows, kPixels>(sums, now + i * T::kStepBytes, warp_row, warp_pixel, lane);
      }
    }
  }

  copy_async_wait<0>();
  __syncthreads();
  float* const results = reinterpret_cast<float*>(shared);
  put_sums<kRows, kPixels>(args, results, sums, filter, warp_row, warp_pixel, lane);
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
  const std::size_t bytes = T::kBytes + static_cast<std::size_t>(taps) * sizeof(Tap);
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
  if (taps < 1 || taps > kMaxTaps) return {"Expected a kernel of 1 to 512 taps"};
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
  if (!is_aligned(args.input) || !is_aligned(args.values) || !is_aligned(args.metadata) ||
      !is_aligned(args.source)) {
    return {"Expected input and packed weight to be aligned to 16 bytes"};
  }
  if (count == 0 || args.filters == 0) return {};
  return args.dtype == DType::kBFloat16 ? launch<BFloat16>(args, count, taps, stream)
                                        : launch<Float16>(args, count, taps, stream);
}

}  // namespace fastpie::cuda
