// CPU kernel of `segmentation_disagreement`. One source, compiled once per instruction set (see
// isa.h).
//
// A chunk of pixels is scored tile by tile: the probabilities of the dense model wait in the L1
// cache while the levels pass by, and those of the pruned models never leave the registers. Pixels
// lie in the lanes of a register, so that two classes use it as well as twenty. Every step is
// vertical and without fused multiply-add, and the columns of the sums are added in order: the same
// bits on every instruction set and for every number of threads.
#include "fastpie/segmentation_disagreement.h"

#include <cstdlib>

#include "columns.h"
#include "element.h"
#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// 1 KiB of each class. With 64 pixels 4 and 21 classes took 1.2x as long, with 1,024 pixels 150 did
// (one thread of Zen 4, AVX-512, 512 x 512).
constexpr std::int64_t kTile = 256;
static_assert(kIouChunk % kTile == 0 && kTile % kBlockFloats == 0, "chunks are made of tiles");
constexpr float kInfinity = __builtin_inff();
// A class lies a power of two from the next in most images: the tiles of more of them than a cache
// set has ways would push each other out of it between the passes.
constexpr std::int64_t kInPlaceMaxClasses = 8;

inline Part part_select(PartBits mask, Part yes, Part no) {
  return part_float((mask & part_bits(yes)) | (~mask & part_bits(no)));
}
inline PartBits read_bits(const std::int32_t* p) {
  PartBits x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline void write_bits(std::int32_t* p, PartBits x) { __builtin_memcpy(p, &x, sizeof(x)); }

inline std::int32_t total(PartBits x) {
  std::int32_t sum = 0;
  for (int i = 0; i < kPartFloats; ++i) sum += x[i];
  return sum;
}

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87, where results would soon be subnormal,
// and for NaN, whose image has no scores. Unlike part_exp without fused multiply-add.
inline Part exp_of_negative(Part x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2Hi = 0.693359375f;  // Cody-Waite split of ln 2 (Cephes)
  constexpr float kLn2Lo = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const PartBits usable = x >= -87.0f;
  x = part_float(usable & part_bits(x));
  const Part shifted = x * kLog2e + kRound;
  const Part n = shifted - kRound;
  const Part r = (x - n * kLn2Hi) - n * kLn2Lo;
  // Taylor series: |r| <= 0.347, so the first term left out is below 6e-9.
  Part y = part_splat(1.0f / 5040.0f);
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  // The low bits of `shifted` hold n; moved to the exponent they multiply by 2^n.
  const auto exponent = reinterpret_cast<PartWords>(shifted) << 23;
  return part_float(usable & reinterpret_cast<PartBits>(reinterpret_cast<PartWords>(y) + exponent));
}

inline Part sigmoid(Part x) {
  const PartBits positive = x > 0.0f;
  const Part e = exp_of_negative(part_select(positive, -x, x));
  const Part large = 1.0f / (1.0f + e);
  return part_select(positive, large, e * large);
}

// ---------------------------------------------------------------------------- pixels of one model

// The logits of a tile, as floats, with pixels side by side.
struct Tile {
  const float* logits;
  std::int64_t class_stride;
};

struct Workspace {
  float* converted;      // [classes][kTile]: logits that cannot be read where they are
  float* probabilities;  // [foreground classes][kTile]: of the dense model
  Part* exps;            // [classes]: of a Part of pixels
  std::int32_t* labels;  // [kTile]: classes that the dense model predicts, 0 the background
};

inline const float* as_floats(const float* p) { return p; }
template <typename T>
const float* as_floats(const T*) {
  return nullptr;
}

// `count` pixels. Those that fill up the last block are background, without a doubt.
template <typename T>
Tile read_tile(const T* base, std::int64_t classes, std::int64_t class_stride,
               std::int64_t pixel_stride, std::int64_t count, float* converted) {
  const float* const in_place = as_floats(base);
  if (in_place != nullptr && pixel_stride == 1 && count % kBlockFloats == 0 &&
      classes <= kInPlaceMaxClasses) {
    return {in_place, class_stride};
  }
  const std::int64_t padded = (kBlockFloats - count % kBlockFloats) % kBlockFloats;
  for (std::int64_t c = 0; c < classes; ++c) {
    const float fill = c == 0 && classes > 1 ? 0.0f : -kInfinity;
    read_floats(base + c * class_stride, pixel_stride, count, padded, fill, converted + c * kTile);
  }
  return {converted, kTile};
}

// What a model says about a Part of pixels, beside the probabilities.
struct Prediction {
  PartBits label;
  PartBits bad;
};

// One or two classes: the probability of the foreground is the sigmoid of one number.
inline Prediction predict_two(const Tile& tile, std::int64_t classes, std::int64_t at, Part* p) {
  Part x = part_load(tile.logits + at);
  PartBits bad = ~(x < kInfinity);
  if (classes == 2) {
    const Part foreground = part_load(tile.logits + tile.class_stride + at);
    bad |= ~(foreground < kInfinity);
    x = foreground - x;
    bad |= x != x;  // both -inf
  }
  *p = sigmoid(x);
  return {(x > 0.0f) & 1, bad};
}

// Leaves the exponentials in `exps`; the probabilities are these times `*scale`.
inline Prediction predict_many(const Tile& tile, std::int64_t classes, std::int64_t at, Part* exps,
                               Part* scale) {
  Part top = part_splat(-kInfinity);
  Prediction prediction{};
  for (std::int64_t c = 0; c < classes; ++c) {
    const Part z = part_load(tile.logits + c * tile.class_stride + at);
    prediction.bad |= ~(z < kInfinity);
    const PartBits greater = z > top;
    const auto index = static_cast<std::int32_t>(c);
    prediction.label = (greater & index) | (~greater & prediction.label);
    top = part_select(greater, z, top);
  }
  prediction.bad |= top == -kInfinity;
  Part sum{};
  for (std::int64_t c = 0; c < classes; ++c) {
    exps[c] = exp_of_negative(part_load(tile.logits + c * tile.class_stride + at) - top);
    sum += exps[c];
  }
  *scale = 1.0f / sum;
  return prediction;
}

// ---------------------------------------------------------------------------- tiles

inline std::int64_t foreground_of(std::int64_t classes) { return classes == 1 ? 1 : classes - 1; }

// Probabilities and labels of the dense model into the workspace. Returns whether any is bad.
bool prepare_dense(const Tile& tile, std::int64_t classes, std::int64_t padded_count,
                   const Workspace& space) {
  PartBits bad{};
  for (std::int64_t at = 0; at < padded_count; at += kPartFloats) {
    Prediction prediction;
    if (classes <= 2) {
      Part p;
      prediction = predict_two(tile, classes, at, &p);
      part_store(space.probabilities + at, p);
    } else {
      Part scale;
      prediction = predict_many(tile, classes, at, space.exps, &scale);
      for (std::int64_t c = 1; c < classes; ++c) {
        part_store(space.probabilities + (c - 1) * kTile + at, space.exps[c] * scale);
      }
    }
    write_bits(space.labels + at, prediction.label);
    bad |= prediction.bad;
  }
  return total(bad) != 0;
}

// Adds a tile at one level to what its chunk has.
void compare_tile(const Tile& tile, std::int64_t classes, std::int64_t padded_count,
                  const Workspace& space, IouPartial* partial) {
  Columns intersection, union_;
  PartBits agreed{}, covered{}, bad{};
  for (int part = 0; part < kParts; ++part) {  // outside: the sums of one Part stay in registers
    Doubles both{}, either{};
    for (std::int64_t at = part * kPartFloats; at < padded_count; at += kBlockFloats) {
      Prediction prediction;
      Part lower{}, upper{};  // sums over the classes, at most 1 and 2: fp32 will do
      if (classes <= 2) {
        Part q;
        prediction = predict_two(tile, classes, at, &q);
        const Part p = part_load(space.probabilities + at);
        lower = part_min(p, q);
        upper = part_max(p, q);
      } else {
        Part scale;
        prediction = predict_many(tile, classes, at, space.exps, &scale);
        for (std::int64_t c = 1; c < classes; ++c) {
          const Part p = part_load(space.probabilities + (c - 1) * kTile + at);
          const Part q = space.exps[c] * scale;
          lower += part_min(p, q);
          upper += part_max(p, q);
        }
      }
      const Doubles low = to_doubles(lower), high = to_doubles(upper);
      both.low += low.low;
      both.high += low.high;
      either.low += high.low;
      either.high += high.high;
      const PartBits label = read_bits(space.labels + at);
      const PartBits in_dense = label != 0, in_pruned = prediction.label != 0;
      const PartBits same = in_dense & (label == prediction.label);
      agreed -= same;  // a true lane is -1
      covered -= in_dense + in_pruned - same;
      bad |= prediction.bad;
    }
    intersection.sums[part] = both;
    union_.sums[part] = either;
  }
  partial->soft_intersection += intersection.total();
  partial->soft_union += union_.total();
  partial->hard_intersection += total(agreed);
  partial->hard_union += total(covered);
  partial->bad |= total(bad) != 0;
}

// ---------------------------------------------------------------------------- threads

struct Context {
  const SegmentationDisagreementArgs* args;
  bool out_of_memory;
};

std::size_t workspace_bytes(std::int64_t classes) {
  const auto n = static_cast<std::size_t>(classes);
  return sizeof(Part) + n * sizeof(Part) + 2 * n * kTile * sizeof(float) +
         kTile * sizeof(std::int32_t);
}

// Index i is chunk i % chunks of image i / chunks.
template <typename T>
void score_chunks(std::int64_t begin, std::int64_t end, void* context_pointer) {
  auto* const context = static_cast<Context*>(context_pointer);
  const SegmentationDisagreementArgs& args = *context->args;
  void* const memory = std::malloc(workspace_bytes(args.classes));
  if (memory == nullptr) {
    __atomic_store_n(&context->out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  const auto address =
      (reinterpret_cast<std::uintptr_t>(memory) + sizeof(Part) - 1) & -sizeof(Part);
  Workspace space{};
  space.exps = reinterpret_cast<Part*>(address);
  space.converted = reinterpret_cast<float*>(space.exps + args.classes);
  space.probabilities = space.converted + args.classes * kTile;
  space.labels =
      reinterpret_cast<std::int32_t*>(space.probabilities + foreground_of(args.classes) * kTile);

  const std::int64_t chunks = iou_chunks(args.pixels);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t image = i / chunks, chunk = i % chunks;
    const auto partial = [&](std::int64_t level) {
      return args.partials + (level * args.images + image) * chunks + chunk;
    };
    for (std::int64_t level = 0; level < args.levels; ++level) *partial(level) = {};
    const std::int64_t first = chunk * kIouChunk;
    const std::int64_t last = first + kIouChunk < args.pixels ? first + kIouChunk : args.pixels;
    for (std::int64_t from = first; from < last; from += kTile) {
      const std::int64_t count = last - from < kTile ? last - from : kTile;
      const std::int64_t padded_count = (count + kBlockFloats - 1) / kBlockFloats * kBlockFloats;
      const std::int64_t* strides = args.dense_strides;
      const T* base = static_cast<const T*>(args.dense) + image * strides[0] + from * strides[2];
      Tile tile = read_tile(base, args.classes, strides[1], strides[2], count, space.converted);
      const bool bad = prepare_dense(tile, args.classes, padded_count, space);
      strides = args.pruned_strides;
      for (std::int64_t level = 0; level < args.levels; ++level) {
        base = static_cast<const T*>(args.pruned) + level * strides[0] + image * strides[1] +
               from * strides[3];
        tile = read_tile(base, args.classes, strides[2], strides[3], count, space.converted);
        compare_tile(tile, args.classes, padded_count, space, partial(level));
        partial(level)->bad |= bad;
      }
    }
  }
  std::free(memory);
}

// The scores of image i % images at level i / images.
void add_up(const SegmentationDisagreementArgs& args, std::int64_t i) {
  const std::int64_t chunks = iou_chunks(args.pixels);
  double soft_intersection = 0.0, soft_union = 0.0;
  std::int64_t hard_intersection = 0, hard_union = 0;
  bool bad = false;
  for (const IouPartial* p = args.partials + i * chunks; p < args.partials + (i + 1) * chunks;
       ++p) {
    soft_intersection += p->soft_intersection;
    soft_union += p->soft_union;
    hard_intersection += p->hard_intersection;
    hard_union += p->hard_union;
    bad = bad || p->bad != 0;
  }
  const double hard = hard_union > 0
                          ? static_cast<double>(hard_intersection) / static_cast<double>(hard_union)
                          : 1.0;
  const double soft = soft_union >= kNoForeground ? soft_intersection / soft_union : 1.0;
  args.out[kIou * args.levels * args.images + i] = static_cast<float>(bad ? kNan : hard);
  args.out[kIouSoft * args.levels * args.images + i] = static_cast<float>(bad ? kNan : soft);
}

}  // namespace

Status segmentation_disagreement(const SegmentationDisagreementArgs& args, int threads) {
  Context context{&args, false};
  const std::int64_t count = args.images * iou_chunks(args.pixels);
  // Shares of about 32 Ki logits, where images are small: enough work to be worth a thread.
  const std::int64_t pixels = args.pixels < kIouChunk ? args.pixels : kIouChunk;
  const std::int64_t logits = (pixels + 1) * args.classes * (args.levels + 1);
  const std::int64_t grain = logits >= 32768 ? 1 : 32768 / logits;
  RangeBody body = &score_chunks<float>;
  if (args.dtype == DType::kBFloat16) body = &score_chunks<BFloat16>;
  if (args.dtype == DType::kFloat16) body = &score_chunks<Float16>;
  parallel_for(count, grain, threads, body, &context);
  if (context.out_of_memory) return {"Out of memory for the workspace of one thread"};
  for (std::int64_t i = 0; i < args.levels * args.images; ++i) add_up(args, i);
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
