// CPU kernel of `relayout`. One source, compiled once per instruction set (see isa.h).
//
// The two inner loops run over the dimension that is closest in the output and the one that is
// closest in the input. Where these differ, squares of 4 x 4 are turned over in registers; four
// values at a time are enough, since memory binds.
#include "fastpie/relayout.h"

#include "activation.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// ---------------------------------------------------------------------------- four values

typedef float Four __attribute__((vector_size(16)));
typedef std::int32_t FourBits __attribute__((vector_size(16)));
typedef std::uint32_t FourWords __attribute__((vector_size(16)));
typedef std::uint16_t FourHalves __attribute__((vector_size(8)));

inline float load1(const float* p) { return *p; }
inline float load1(const std::uint16_t* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline Four load4(const float* p) {
  Four x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline Four load4(const std::uint16_t* p) {
  FourHalves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return reinterpret_cast<Four>(__builtin_convertvector(halves, FourWords) << 16);
}
inline void store4(float* p, Four x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline void store4(std::uint16_t* p, Four x) {  // to nearest, ties to even
  const auto bits = reinterpret_cast<FourWords>(x);
  const FourWords rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto ordered = reinterpret_cast<FourWords>(x == x);
  const FourWords chosen = (ordered & rounded) | (~ordered & 0x7fc00000u);
  const FourHalves halves = __builtin_convertvector(chosen >> 16, FourHalves);
  __builtin_memcpy(p, &halves, sizeof(halves));
}
inline void store1(float* p, float x) { *p = x; }
inline void store1(std::uint16_t* p, float x) {
  std::uint16_t four[4];
  store4(four, Four{x, x, x, x});
  *p = four[0];
}

// ---------------------------------------------------------------------------- scale and shift

struct Transform {
  bool identity;
  const float* scale;
  const float* shift;
  Activation activation;
};

// activate(scale * x + shift), the channels of the four values being channel + i * step.
template <bool kIdentity>
inline Four apply(const Transform& f, Four x, std::int64_t channel, int step) {
  if (kIdentity) return x;
  float lanes[kPartFloats < 4 ? 4 : kPartFloats] = {};
  for (int i = 0; i < 4; ++i) {
    const float scale = f.scale == nullptr ? 1.0f : f.scale[channel + i * step];
    const float shift = f.shift == nullptr ? 0.0f : f.shift[channel + i * step];
    lanes[i] = x[i] * scale + shift;
  }
  if (f.activation.kind == Activation::kRelu) {  // by far the most common
    for (int i = 0; i < 4; ++i) lanes[i] = lanes[i] < 0.0f ? 0.0f : lanes[i];
  } else if (f.activation.kind != Activation::kNone) {
    part_store(lanes, part_activate(part_load(lanes), f.activation));
  }
  return load4(lanes);
}
template <bool kIdentity>
inline float apply(const Transform& f, float x, std::int64_t channel) {
  return kIdentity ? x : apply<kIdentity>(f, Four{x, x, x, x}, channel, 0)[0];
}

// ---------------------------------------------------------------------------- loops

struct Loop {
  std::int64_t size;
  std::int64_t in;   // stride of the input
  std::int64_t out;  // stride of the output
  bool channel;      // scale and shift go along it
};

struct Plan {
  const RelayoutArgs* args;
  Transform transform;
  Loop inner;   // closest in the output
  Loop second;  // closest in the input where that is another one, else the next closest
  Loop third;   // the next closest in the output: work enough for one unit
  Loop outer[kRelayoutDims];
  int outer_count;
  std::int64_t units;
  std::int64_t grain;  // units of a share's step
};

// What follows takes loops by value: the compiler could not know that a store leaves them alone.
template <bool kIdentity, typename In, typename Out>
void copy_line(const Transform f, const Loop loop, const In* in, Out* out, std::int64_t channel) {
  const int step = loop.channel ? 1 : 0;
  std::int64_t i = 0;
  if (loop.out == 1 && loop.in == 1) {
    for (; i + 4 <= loop.size; i += 4) {
      store4(out + i, apply<kIdentity>(f, load4(in + i), channel + i * step, step));
    }
  } else if (loop.out == 1 && loop.in == 2) {
    for (; i + 5 <= loop.size; i += 4) {  // one more: the second load ends behind the last value
      const Four a = load4(in + 2 * i);
      const Four b = load4(in + 2 * i + 4);
      const Four x = __builtin_shufflevector(a, b, 0, 2, 4, 6);
      store4(out + i, apply<kIdentity>(f, x, channel + i * step, step));
    }
  }
  for (; i < loop.size; ++i) {
    store1(out + i * loop.out, apply<kIdentity>(f, load1(in + i * loop.in), channel + i * step));
  }
}

// Words at even (or odd) places of two parts.
#if defined(__AVX512F__)
#define FASTPIE_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FASTPIE_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define FASTPIE_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FASTPIE_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define FASTPIE_EVEN 0, 2, 4, 6
#define FASTPIE_ODD 1, 3, 5, 7
#endif
inline PartWords even_words(PartWords a, PartWords b) {
  return __builtin_shufflevector(a, b, FASTPIE_EVEN);
}
inline PartWords odd_words(PartWords a, PartWords b) {
  return __builtin_shufflevector(a, b, FASTPIE_ODD);
}
#undef FASTPIE_EVEN
#undef FASTPIE_ODD

template <typename T>
inline PartWords load_words(const T* p) {
  PartWords x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <typename T>
inline void store_words(T* p, PartWords x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// The values at even places go to `even`, those at odd places to `odd`, `count` each: the two
// phases of a stride of two. Returns how many were done.
inline std::int64_t split_line(const float* in, float* even, float* odd, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kPartFloats <= count; i += kPartFloats) {
    const PartWords a = load_words(in + 2 * i), b = load_words(in + 2 * i + kPartFloats);
    store_words(even + i, even_words(a, b));
    store_words(odd + i, odd_words(a, b));
  }
  return i;
}
inline std::int64_t split_line(const std::uint16_t* in, std::uint16_t* even, std::uint16_t* odd,
                               std::int64_t count) {
  constexpr int kValues = 2 * kPartFloats;
  std::int64_t i = 0;
  for (; i + kValues <= count; i += kValues) {  // little endian: the first of a pair lies low
    const PartWords a = load_words(in + 2 * i), b = load_words(in + 2 * i + kValues);
    const PartWords first = even_words(a, b), second = odd_words(a, b);
    store_words(even + i, (first & 0xffffu) | (second << 16));
    store_words(odd + i, (first >> 16) | (second & 0xffff0000u));
  }
  return i;
}
inline std::int64_t take_even(const float* in, float* out, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kPartFloats < count; i += kPartFloats) {  // the last load ends behind the last value
    store_words(out + i, even_words(load_words(in + 2 * i), load_words(in + 2 * i + kPartFloats)));
  }
  return i;
}
inline std::int64_t take_even(const std::uint16_t* in, std::uint16_t* out, std::int64_t count) {
  constexpr int kValues = 2 * kPartFloats;
  std::int64_t i = 0;
  for (; i + kValues < count; i += kValues) {
    const PartWords a = load_words(in + 2 * i), b = load_words(in + 2 * i + kValues);
    store_words(out + i, (even_words(a, b) & 0xffffu) | (odd_words(a, b) << 16));
  }
  return i;
}

// Lines of which every second value is wanted, or all in two lines.
template <typename T>
bool copy_strided_lines(const Loop inner, const Loop second, const T* in, T* out) {
  if (inner.in != 2 || inner.out != 1) return false;
  if (second.in == 1 && second.size == 2) {
    for (std::int64_t i = split_line(in, out, out + second.out, inner.size); i < inner.size; ++i) {
      out[i] = in[2 * i];
      out[i + second.out] = in[2 * i + 1];
    }
    return true;
  }
  for (std::int64_t j = 0; j < second.size; ++j) {
    const T* const from = in + j * second.in;
    T* const to = out + j * second.out;
    for (std::int64_t i = take_even(from, to, inner.size); i < inner.size; ++i) to[i] = from[2 * i];
  }
  return true;
}
template <typename In, typename Out>
bool copy_strided_lines(const Loop, const Loop, const In*, Out*) {
  return false;  // dtypes differ
}

// Lines of a few values each, as images side by side are: `kValues` at once.
template <int kValues, typename T>
void copy_short_lines(const Loop second, const T* in, T* out) {
  for (std::int64_t j = 0; j < second.size; ++j) {
    __builtin_memcpy(out + j * second.out, in + j * second.in, kValues * sizeof(T));
  }
}
template <typename T>
bool copy_short_lines(const Loop inner, const Loop second, const T* in, T* out) {
  if (inner.in != 1 || inner.out != 1) return false;
  switch (inner.size) {
    case 2:
      copy_short_lines<2>(second, in, out);
      return true;
    case 4:
      copy_short_lines<4>(second, in, out);
      return true;
    case 8:
      copy_short_lines<8>(second, in, out);
      return true;
    case 16:
      copy_short_lines<16>(second, in, out);
      return true;
    default:
      return false;
  }
}
template <typename In, typename Out>
bool copy_short_lines(const Loop, const Loop, const In*, Out*) {
  return false;  // dtypes differ
}

// 4 x 4 values: rows of the input become columns of the output.
template <bool kIdentity, typename In, typename Out>
inline void turn_square(const Transform& f, const Loop& inner, const Loop& second, const In* in,
                        Out* out, std::int64_t channel) {
  const Four a = load4(in), b = load4(in + inner.in), c = load4(in + 2 * inner.in),
             d = load4(in + 3 * inner.in);
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Four columns[4] = {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
                           __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
                           __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                           __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const std::int64_t first = channel + (second.channel ? j : 0);
    store4(out + j * second.out, apply<kIdentity>(f, columns[j], first, inner.channel ? 1 : 0));
  }
}

// The two inner loops.
template <bool kIdentity, typename In, typename Out>
void copy_plane(const Transform f, const Loop inner, const Loop second, const In* in, Out* out,
                std::int64_t channel) {
  std::int64_t j = 0;
  if (inner.out == 1 && second.in == 1 && inner.size >= 4 && second.size >= 4) {
    for (; j + 4 <= second.size; j += 4) {
      const std::int64_t base = channel + (second.channel ? j : 0);
      std::int64_t i = 0;
      for (; i + 4 <= inner.size; i += 4) {
        turn_square<kIdentity>(f, inner, second, in + i * inner.in + j, out + i + j * second.out,
                               base + (inner.channel ? i : 0));
      }
      for (; i < inner.size; ++i) {
        for (std::int64_t k = j; k < j + 4; ++k) {
          const std::int64_t c = channel + (second.channel ? k : 0) + (inner.channel ? i : 0);
          store1(out + i + k * second.out, apply<kIdentity>(f, load1(in + i * inner.in + k), c));
        }
      }
    }
  } else if (kIdentity && (copy_short_lines(inner, second, in, out) ||
                           copy_strided_lines(inner, second, in, out))) {
    return;
  }
  for (; j < second.size; ++j) {
    copy_line<kIdentity>(f, inner, in + j * second.in, out + j * second.out,
                         channel + (second.channel ? j : 0));
  }
}

template <bool kIdentity, typename In, typename Out>
void run_planes(std::int64_t begin, std::int64_t end, void* context) {
  const auto& plan = *static_cast<const Plan*>(context);
  const RelayoutArgs& args = *plan.args;
  const std::int64_t last = end * plan.grain < plan.units ? end * plan.grain : plan.units;
  for (std::int64_t unit = begin * plan.grain; unit < last; ++unit) {
    std::int64_t rest = unit;
    std::int64_t in_offset = 0;
    std::int64_t out_offset = 0;
    std::int64_t channel = 0;
    for (int d = plan.outer_count - 1; d >= 0; --d) {
      const Loop& loop = plan.outer[d];
      const std::int64_t index = rest % loop.size;
      rest /= loop.size;
      in_offset += index * loop.in;
      out_offset += index * loop.out;
      if (loop.channel) channel = index;
    }
    const Loop& third = plan.third;
    for (std::int64_t k = 0; k < third.size; ++k) {
      copy_plane<kIdentity>(plan.transform, plan.inner, plan.second,
                            static_cast<const In*>(args.input) + in_offset + k * third.in,
                            static_cast<Out*>(args.output) + out_offset + k * third.out,
                            channel + (third.channel ? k : 0));
    }
  }
}

template <bool kIdentity>
RangeBody body_for(const RelayoutArgs& args) {
  using Half = std::uint16_t;
  if (args.input_dtype == DType::kBFloat16) {
    return args.output_dtype == DType::kBFloat16 ? &run_planes<kIdentity, Half, Half>
                                                 : &run_planes<kIdentity, Half, float>;
  }
  return args.output_dtype == DType::kBFloat16 ? &run_planes<kIdentity, float, Half>
                                               : &run_planes<kIdentity, float, float>;
}

}  // namespace

Status relayout(const RelayoutArgs& args, int threads) {
  Plan plan{};
  plan.args = &args;
  plan.transform = {
      args.scale == nullptr && args.shift == nullptr && args.activation.kind == Activation::kNone,
      args.scale, args.shift, args.activation};
  // The dimensions longer than 1; of equal strides the later one is the closer.
  Loop loops[kRelayoutDims];
  int count = 0;
  for (int d = 0; d < kRelayoutDims; ++d) {
    if (args.sizes[d] == 0) return {};
    if (args.sizes[d] > 1) {
      loops[count++] = {args.sizes[d], args.input_strides[d], args.output_strides[d], d == 1};
    }
  }
  int inner = -1;
  int second = -1;
  for (int d = 0; d < count; ++d) {
    if (inner < 0 || loops[d].out <= loops[inner].out) inner = d;
    if (second < 0 || loops[d].in <= loops[second].in) second = d;
  }
  if (second == inner) {  // lines stay lines: the next dimension of the output follows
    second = -1;
    for (int d = 0; d < count; ++d) {
      if (d != inner && (second < 0 || loops[d].out <= loops[second].out)) second = d;
    }
  }
  int third = -1;
  for (int d = 0; d < count; ++d) {
    if (d == inner || d == second) continue;
    if (third < 0 || loops[d].out <= loops[third].out) third = d;
  }
  const Loop one{1, 0, 0, false};
  plan.inner = inner < 0 ? one : loops[inner];
  plan.second = second < 0 ? one : loops[second];
  plan.third = third < 0 ? one : loops[third];
  std::int64_t units = 1;
  for (int d = 0; d < count; ++d) {
    if (d == inner || d == second || d == third) continue;
    plan.outer[plan.outer_count++] = loops[d];
    units *= loops[d].size;
  }
  if (args.input_dtype == DType::kFloat16 || args.output_dtype == DType::kFloat16) {
    return {"Expected dtypes to be fp32 or bf16"};
  }
  const RangeBody body = plan.transform.identity ? body_for<true>(args) : body_for<false>(args);
  // Steps of 32 KiB at least. Shares: a thread's are whole images where there are several, which it
  // has just written, and will read.
  const std::int64_t values = plan.inner.size * plan.second.size * plan.third.size;
  const std::int64_t share = (units + threads - 1) / threads;
  plan.units = units;
  plan.grain = 1 + 8192 / values < share ? 1 + 8192 / values : share;
  parallel_ranges((units + plan.grain - 1) / plan.grain, threads, body, &plan);
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
