// CPU kernel of `relayout`. One source, compiled once per instruction set (see isa.h).
//
// The inner two loops run over the dimension that is closest in the output and the one that is
// closest in the input. Where these differ, squares of 16 x 16 go through a buffer in L1, so that
// both sides are touched a line at a time.
#include "fastpie/relayout.h"

#include "activation.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

constexpr std::int64_t kSquare = 16;

inline float read(const float* p) { return *p; }
inline float read(const std::uint16_t* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void write(float* p, float value) { *p = value; }
inline void write(std::uint16_t* p, float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  *p = static_cast<std::uint16_t>((value == value ? rounded : 0x7fc00000u) >> 16);
}

struct Loop {
  std::int64_t size;
  std::int64_t in;   // stride of the input
  std::int64_t out;  // stride of the output
  bool channel;      // scale and shift go along it
};

struct Plan {
  const RelayoutArgs* args;
  Loop inner;   // closest in the output
  Loop second;  // closest in the input; size 1 where that is `inner` too
  Loop outer[kRelayoutDims];
  int outer_count;
  std::int64_t second_blocks;
};

// scale * x + shift of one channel on `count` values in place.
inline void transform(const RelayoutArgs& args, std::int64_t channel, float* values) {
  const float scale = args.scale == nullptr ? 1.0f : args.scale[channel];
  const float shift = args.shift == nullptr ? 0.0f : args.shift[channel];
  for (int p = 0; p < kParts; ++p) {
    const Part x = part_load(values + p * kPartFloats);
    const Part y = part_fma(part_splat(scale), x, part_splat(shift));
    part_store(values + p * kPartFloats, part_activate(y, args.activation));
  }
}

// A square: up to 16 of `inner` by up to 16 of `second`.
template <typename In, typename Out>
void copy_square(const Plan& plan, const In* in, Out* out, std::int64_t inner, std::int64_t second,
                 std::int64_t channel, bool changes) {
  float square[kSquare][kSquare] = {};  // [second][inner]
  if (plan.second.size > 1 && plan.second.in < plan.inner.in) {
    for (std::int64_t i = 0; i < inner; ++i) {
      for (std::int64_t j = 0; j < second; ++j) {
        square[j][i] = read(in + i * plan.inner.in + j * plan.second.in);
      }
    }
  } else {
    for (std::int64_t j = 0; j < second; ++j) {
      for (std::int64_t i = 0; i < inner; ++i) {
        square[j][i] = read(in + i * plan.inner.in + j * plan.second.in);
      }
    }
  }
  if (changes) {
    if (plan.inner.channel) {  // the channel changes along the line: one value at a time
      for (std::int64_t i = 0; i < inner; ++i) {
        float line[kSquare];
        for (std::int64_t j = 0; j < kSquare; ++j) line[j] = square[j][i];
        transform(*plan.args, channel + i, line);
        for (std::int64_t j = 0; j < kSquare; ++j) square[j][i] = line[j];
      }
    } else {
      for (std::int64_t j = 0; j < second; ++j) {
        transform(*plan.args, plan.second.channel ? channel + j : channel, square[j]);
      }
    }
  }
  for (std::int64_t j = 0; j < second; ++j) {
    for (std::int64_t i = 0; i < inner; ++i) {
      write(out + i * plan.inner.out + j * plan.second.out, square[j][i]);
    }
  }
}

template <typename In, typename Out>
void run_units(std::int64_t begin, std::int64_t end, void* context) {
  const auto& plan = *static_cast<const Plan*>(context);
  const RelayoutArgs& args = *plan.args;
  const bool changes =
      args.scale != nullptr || args.shift != nullptr || args.activation.kind != Activation::kNone;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t second = (unit % plan.second_blocks) * kSquare;
    std::int64_t rest = unit / plan.second_blocks;
    std::int64_t in_offset = second * plan.second.in;
    std::int64_t out_offset = second * plan.second.out;
    std::int64_t channel = plan.second.channel ? second : 0;
    for (int d = plan.outer_count - 1; d >= 0; --d) {
      const Loop& loop = plan.outer[d];
      const std::int64_t index = rest % loop.size;
      rest /= loop.size;
      in_offset += index * loop.in;
      out_offset += index * loop.out;
      if (loop.channel) channel = index;
    }
    const In* const in = static_cast<const In*>(args.input) + in_offset;
    Out* const out = static_cast<Out*>(args.output) + out_offset;
    const std::int64_t left = plan.second.size - second;
    const std::int64_t rows = left < kSquare ? left : kSquare;
    if (!changes && plan.second.size == 1 && plan.inner.out == 1) {  // lines as they are
      for (std::int64_t i = 0; i < plan.inner.size; ++i)
        write(out + i, read(in + i * plan.inner.in));
      continue;
    }
    for (std::int64_t i = 0; i < plan.inner.size; i += kSquare) {
      const std::int64_t remaining = plan.inner.size - i;
      copy_square(plan, in + i * plan.inner.in, out + i * plan.inner.out,
                  remaining < kSquare ? remaining : kSquare, rows,
                  plan.inner.channel ? channel + i : channel, changes);
    }
  }
}

}  // namespace

Status relayout(const RelayoutArgs& args, int threads) {
  Plan plan{};
  plan.args = &args;
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
  plan.inner = inner < 0 ? Loop{1, 1, 1, false} : loops[inner];
  plan.second = second < 0 || second == inner ? Loop{1, 0, 0, false} : loops[second];
  for (int d = 0; d < count; ++d) {
    if (d != inner && d != second) plan.outer[plan.outer_count++] = loops[d];
  }
  plan.second_blocks = (plan.second.size + kSquare - 1) / kSquare;
  std::int64_t units = plan.second_blocks;
  for (int d = 0; d < plan.outer_count; ++d) units *= plan.outer[d].size;

  const bool in_bf16 = args.input_dtype == DType::kBFloat16;
  const bool out_bf16 = args.output_dtype == DType::kBFloat16;
  if (args.input_dtype == DType::kFloat16 || args.output_dtype == DType::kFloat16) {
    return {"Expected dtypes to be fp32 or bf16"};
  }
  const RangeBody body =
      in_bf16
          ? (out_bf16 ? &run_units<std::uint16_t, std::uint16_t> : &run_units<std::uint16_t, float>)
          : (out_bf16 ? &run_units<float, std::uint16_t> : &run_units<float, float>);
  const std::int64_t values =
      plan.inner.size * (plan.second.size < kSquare ? plan.second.size : kSquare);
  const std::int64_t grain = 8192 / (values < 8192 ? values : 8192);  // 32 KiB of work at least
  parallel_for(units, grain, threads, body, &plan);
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
