// CPU kernel of `max_pool`. One source, compiled once per instruction set (see isa.h).
//
// The rows of a window are folded into one row first, line by line; the window slides along that
// row, which is in the L1 cache.
#include "fastpie/max_pool.h"

#include <cstdlib>

#include "block.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

inline float read(const float* p) { return *p; }
inline float read(const std::uint16_t* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void write(float* p, float value) { *p = value; }
inline void write(std::uint16_t* p, float value) {  // exact: the value was read from bf16
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  *p = static_cast<std::uint16_t>(bits >> 16);
}

// best = max(best, row), value by value; a NaN stays.
template <typename T>
void fold(const T* __restrict row, std::int64_t count, float* __restrict best) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = read(row + i);
    best[i] = best[i] >= x || best[i] != best[i] ? best[i] : x;
  }
}

// best[x] = max(best[x], row[x * kStride]): the stride is known to the compiler.
template <int kStride>
void fold_strided(const float* __restrict row, std::int64_t count, float* __restrict best) {
  for (std::int64_t x = 0; x < count; ++x) {
    const float value = row[x * kStride];
    best[x] = best[x] >= value || best[x] != best[x] ? best[x] : value;
  }
}

// Slides the window along `row`, tap by tap; `best` holds one row of the output.
template <typename T>
void pool_row(const MaxPoolArgs& args, const float* row, float* best, T* out) {
  const std::int64_t width = args.input_size[2], images = args.images, stride = args.stride[2];
  const std::int64_t count = args.output_size[2];
  for (std::int64_t i = 0; i < count * images; ++i) best[i] = kNegativeInfinity;
  for (std::int64_t k = 0; k < args.kernel[2]; ++k) {
    // Output pixels [first, last) whose tap k lies inside the row.
    const std::int64_t shift = k * args.dilation[2] - args.padding[2];
    const std::int64_t first = shift < 0 ? (-shift + stride - 1) / stride : 0;
    std::int64_t last = width - 1 - shift < 0 ? 0 : (width - 1 - shift) / stride + 1;
    if (last > count) last = count;
    if (first >= last) continue;
    const float* const from = row + (first * stride + shift) * images;
    if (stride == 1) {
      fold_strided<1>(from, (last - first) * images, best + first * images);
    } else if (images == 1 && stride == 2) {
      fold_strided<2>(from, last - first, best + first);
    } else {
      for (std::int64_t x = 0; x < last - first; ++x) {
        fold_strided<1>(from + x * stride * images, images, best + (first + x) * images);
      }
    }
  }
  for (std::int64_t i = 0; i < count * images; ++i) write(out + i, best[i]);
}

struct Job {
  const MaxPoolArgs* args;
  Status status;
};

template <typename T>
void run_channels(std::int64_t begin, std::int64_t end, void* context) {
  auto& job = *static_cast<Job*>(context);
  const MaxPoolArgs& args = *job.args;
  const std::int64_t values = args.input_size[2] * args.images;
  const std::int64_t pooled = args.output_size[2] * args.images;
  const auto bytes = sizeof(float) * static_cast<std::size_t>(values + pooled);
  auto* const row = static_cast<float*>(std::malloc(bytes));
  if (row == nullptr) {
    job.status = {"Expected memory for two rows of a max pooling"};
    return;
  }
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t group = unit / args.channels;
    const std::int64_t channel = unit % args.channels;
    const T* const in = static_cast<const T*>(args.input) + group * args.input_strides.group +
                        channel * args.input_strides.channel;
    T* const out = static_cast<T*>(args.output) + group * args.output_strides.group +
                   channel * args.output_strides.channel;
    for (std::int64_t z = 0; z < args.output_size[0]; ++z) {
      for (std::int64_t y = 0; y < args.output_size[1]; ++y) {
        for (std::int64_t i = 0; i < values; ++i) row[i] = kNegativeInfinity;
        for (std::int64_t kz = 0; kz < args.kernel[0]; ++kz) {
          const std::int64_t iz = z * args.stride[0] + kz * args.dilation[0] - args.padding[0];
          if (iz < 0 || iz >= args.input_size[0]) continue;
          for (std::int64_t ky = 0; ky < args.kernel[1]; ++ky) {
            const std::int64_t iy = y * args.stride[1] + ky * args.dilation[1] - args.padding[1];
            if (iy < 0 || iy >= args.input_size[1]) continue;
            fold(in + iz * args.input_strides.slice + iy * args.input_strides.row, values, row);
          }
        }
        pool_row(args, row, row + values,
                 out + z * args.output_strides.slice + y * args.output_strides.row);
      }
    }
  }
  std::free(row);
}

}  // namespace

Status max_pool(const MaxPoolArgs& args, int threads) {
  if (args.dtype == DType::kFloat16) return {"Expected dtype to be fp32 or bf16"};
  Job job{&args, {}};
  const std::int64_t units = args.groups * args.channels;
  // A thread's share is whole images where there are several, which it has just written.
  parallel_ranges(
      units, threads,
      args.dtype == DType::kFloat32 ? &run_channels<float> : &run_channels<std::uint16_t>, &job);
  return job.status;
}

}  // namespace fastpie::cpu::FASTPIE_ISA
