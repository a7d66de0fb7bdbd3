// CUDA kernel of `disagreement`. The same name and contract as cpu/disagreement.cpp.
//
// Up to kGroupMaxClasses classes a group of lanes scores a row in registers, several rows per warp,
// and ranks by counting. Above that a block scores a row: its keys are sorted in shared memory and
// each class finds its rank by binary search; the logits themselves are read again in every pass,
// from L1 or L2, so that shared memory holds 6 bytes per class and 16,384 classes fit the 99 KiB of
// the smallest GPUs. Both prepare the dense side once for all levels and share every formula.
//
// Arithmetic is fp32 (rank sums are exact integers). What the CPU gets from fp64 comes here from
// formulas without cancellation, see `Divergence`; only the last few operations on one row's
// margin and losses are in fp64, because logits near the largest float overflow there.
#include <cuda_runtime.h>

#include <cfloat>
#include <climits>
#include <cstring>

#include "cuda/element.h"
#include "fastpie/disagreement.h"

namespace fastpie::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// With 256 the registers (up to 89) leave room for 16 warps on a multiprocessor instead of 20.
constexpr int kGroupThreads = 128;
constexpr int kGroupMaxClasses = 128;
constexpr int kMaxBlocks = 65535;  // several waves of any GPU; the kernels stride over the rest
constexpr int kRowMaxThreads = 512;
constexpr int kRowMaxWarps = kRowMaxThreads / kWarp;
constexpr int kTile = 128;  // keys that a warp sorts in registers, four per lane

// ---------------------------------------------------------------------------- reading logits

// -0 becomes +0, so that the two tie.
template <typename T>
__device__ __forceinline__ float load(const T* row, std::int64_t c) {
  return __fadd_rn(to_float(row[c]), 0.0f);
}

__device__ float load(const DisagreementArgs& args, const void* base, std::int64_t index) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return load(static_cast<const BFloat16Bits*>(base), index);
    case DType::kFloat16:
      return load(static_cast<const __half*>(base), index);
    default:
      return load(static_cast<const float*>(base), index);
  }
}

// ---------------------------------------------------------------------------- reductions

// `value` of the lane whose index differs in `mask`, for any struct of 32-bit words.
template <typename V>
__device__ __forceinline__ V exchange(const V& value, int mask) {
  static_assert(sizeof(V) % sizeof(unsigned) == 0, "shuffles move 32-bit words");
  unsigned words[sizeof(V) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kAllLanes, word, mask);
  V result;
  memcpy(&result, words, sizeof(V));
  return result;
}

// The lanes that work on one row: kLanes neighbours within a warp, without shared memory.
template <int kLanes>
struct Group {
  template <typename V>
  __device__ __forceinline__ V reduce(V value) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value.merge(exchange(value, mask));
    return value;
  }
};

// The block that works on one row. All threads get the same bits: each adds the warps' values up in
// the same order.
struct Block {
  static constexpr int kWords = 8;  // the largest struct that is reduced
  std::uint64_t (*scratch)[kWords / 2];

  template <typename V>
  __device__ __forceinline__ V reduce(V value) {
    static_assert(sizeof(V) <= kWords * sizeof(unsigned), "enlarge kWords");
    value = Group<kWarp>().reduce(value);
    if (threadIdx.x % kWarp == 0) memcpy(scratch[threadIdx.x / kWarp], &value, sizeof(V));
    __syncthreads();
    memcpy(&value, scratch[0], sizeof(V));
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) {
      V other;
      memcpy(&other, scratch[warp], sizeof(V));
      value.merge(other);
    }
    __syncthreads();  // the scratch is free again
    return value;
  }
};

// ---------------------------------------------------------------------------- one model's row

// What one pass over the logits of a row tells.
struct Extremes {
  float top = -INFINITY;     // largest logit, the first of equal ones
  float second = -INFINITY;  // largest of the others
  float bottom = INFINITY;
  int top_class = INT_MAX;
  int bad = 0;  // NaN or +inf seen

  __device__ __forceinline__ void add(float z, int c) {
    bad |= !(z < INFINITY);
    bottom = fminf(bottom, z);
    merge_top(z, -INFINITY, c);
  }
  __device__ __forceinline__ void merge(const Extremes& other) {
    bad |= other.bad;
    bottom = fminf(bottom, other.bottom);
    merge_top(other.top, other.second, other.top_class);
  }
  __device__ __forceinline__ void merge_top(float other, float other_second, int other_class) {
    const bool wins = other > top || (other == top && other_class < top_class);
    second = fmaxf(fminf(top, other), fmaxf(second, other_second));
    top_class = wins ? other_class : top_class;
    top = fmaxf(top, other);
  }
};

// What a second pass adds, given the extremes.
struct Sums {
  float rest = 0.0f;    // sum of exp(z - top) over all classes but the top one
  float square = 0.0f;  // sum of (z * scale)^2
  __device__ __forceinline__ void merge(const Sums& other) {
    rest += other.rest;
    square += other.square;
  }
};

struct RankSum {
  long long value = 0;
  __device__ __forceinline__ void merge(const RankSum& other) { value += other.value; }
};

struct Side {
  Extremes extremes;
  float scale;       // a power of two near 1 / max |z|: the squares of z * scale stay in range
  float unit;        // z * scale * unit is z / max(norm(z), 1e-12), as torch's normalize
  float reciprocal;  // 1 / sum(exp(z - top))
  float log_sum;     // log(sum(exp(z - top))), small where the row is certain
  long long rank_square;
  double margin;
  double loss;

  __device__ __forceinline__ void set_extremes(const Extremes& value) {
    extremes = value;
    const float largest = fmaxf(fabsf(value.top), fabsf(value.bottom));
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // biased
    const int wanted = 254 - exponent;
    const int biased = wanted < 1 ? 1 : (wanted > 253 ? 253 : wanted);
    scale = __uint_as_float(static_cast<unsigned>(biased) << 23);
  }
  __device__ __forceinline__ void add(float z, int c, Sums* sums) const {
    sums->rest += c == extremes.top_class ? 0.0f : expf(z - extremes.top);
    const float scaled = z * scale;
    sums->square += scaled * scaled;
  }
  __device__ __forceinline__ void set_sums(const Sums& sums) {
    unit = 1.0f / fmaxf(sqrtf(sums.square), 1e-12f * scale);
    reciprocal = 1.0f / (1.0f + sums.rest);
    log_sum = log1pf(sums.rest);
    if (extremes.bottom == -INFINITY) unit = NAN;  // as -inf / inf
  }
  __device__ __forceinline__ float probability(float z) const {
    return expf(z - extremes.top) * reciprocal;
  }
  // A quarter of the log probability: the difference of two of them cannot overflow.
  __device__ __forceinline__ float quarter_log(float z) const {
    return (0.25f * z - 0.25f * extremes.top) - 0.25f * log_sum;
  }
  // Products that no compiler may contract: equal rows must give a difference of exactly zero.
  __device__ __forceinline__ float direction(float z) const {
    return __fmul_rn(__fmul_rn(z, scale), unit);
  }
};

// ---------------------------------------------------------------------------- formulas

// atanh(t) / t - 1 over t^2, for |t| <= 1/3 to fp32: 1/3 + t^2/5 + t^4/7 + ...
__device__ __forceinline__ float atanh_tail(float t2) {
  float y = 1.0f / 17.0f;
  y = fmaf(y, t2, 1.0f / 15.0f);
  y = fmaf(y, t2, 1.0f / 13.0f);
  y = fmaf(y, t2, 1.0f / 11.0f);
  y = fmaf(y, t2, 1.0f / 9.0f);
  y = fmaf(y, t2, 1.0f / 7.0f);
  y = fmaf(y, t2, 1.0f / 5.0f);
  return fmaf(y, t2, 1.0f / 3.0f);
}

// log(1 + x) for x in [0, 1].
__device__ __forceinline__ float log1p_unit(float x) {
  const float t = __fdividef(x, 2.0f + x);
  const float t2 = t * t;
  return 2.0f * fmaf(t * t2, atanh_tail(t2), t);
}

// exp(x) - 1 for |x| < 1/2.
__device__ __forceinline__ float expm1_half(float x) {
  float y = 1.0f / 40320.0f;
  y = fmaf(y, x, 1.0f / 5040.0f);
  y = fmaf(y, x, 1.0f / 720.0f);
  y = fmaf(y, x, 1.0f / 120.0f);
  y = fmaf(y, x, 1.0f / 24.0f);
  y = fmaf(y, x, 1.0f / 6.0f);
  y = fmaf(y, x, 0.5f);
  return fmaf(x * x, y, x);
}

// tanh(x / 2) for |x| < 1/2.
__device__ __forceinline__ float tanh_half(float x) {
  const float h = 0.5f * x;
  const float h2 = h * h;
  float y = 62.0f / 2835.0f;
  y = fmaf(y, h2, -17.0f / 315.0f);
  y = fmaf(y, h2, 2.0f / 15.0f);
  y = fmaf(y, h2, -1.0f / 3.0f);
  return fmaf(h * h2, y, h);
}

// Below this |log(q / p)| the series in t are used; they reach fp32 accuracy there.
constexpr float kNear = 0.5f;
// KL sums are kept in units of 2^16 and logarithms in quarters, so that kMaxClasses terms of
// logits up to the largest float stay finite where their mean does.
constexpr float kKlUnit = 65536.0f;
constexpr float kPerKlUnit = 1.0f / kKlUnit;
// Shares of the probability below this count nothing; reciprocals of smaller ones overflow.
constexpr float kTiny = 1e-37f;

// Divergences of p and q, one outcome at a time. To each KL term q - p is added, whose sum is zero:
// every term p * (e^x - 1 - x), x = log(q / p), is then non-negative, equal rows give exactly zero,
// and an error in the normalisation, common to all x, enters only in the second order. With
// t = (q - p) / (q + p) = tanh(x / 2):
//   KL(p || q)  p * (e^x - 1 - x) = (p + q) t^2 - 2 p t^3 (1/3 + t^2/5 + t^4/7 + ...)
//   JS          (p + q)/2 * ((1-t) log(1-t) + (1+t) log(1+t))/2
//             = (p + q)/2 * (t^2/2 + t^4/12 + t^6/30 + ...)
struct Divergence {
  float js = 0.0f;
  float kl = 0.0f;          // in kKlUnit
  float kl_reverse = 0.0f;  // in kKlUnit

  // |log(q / p)| < kNear, given t to full relative accuracy.
  __device__ __forceinline__ void add_near(float p, float q, float t) {
    const float t2 = t * t;
    const float s = p + q;
    float phi = 1.0f / 90.0f;
    phi = fmaf(phi, t2, 1.0f / 56.0f);
    phi = fmaf(phi, t2, 1.0f / 30.0f);
    phi = fmaf(phi, t2, 1.0f / 12.0f);
    phi = fmaf(phi, t2, 0.5f);
    js += 0.5f * s * t2 * phi;
    const float square = s * t2;
    const float cube = 2.0f * t * t2 * atanh_tail(t2);
    kl += kPerKlUnit * (square - p * cube);
    kl_reverse += kPerKlUnit * (square + q * cube);
  }

  // Any other pair. p4 and q4 are log(p) / 4 and log(q) / 4; -inf for a probability of zero.
  __device__ __forceinline__ void add_far(float p, float q, float p4, float q4) {
    const float more = fmaxf(p, q);
    const float less = fminf(p, q);
    const float x4 = q4 - p4;
    if (more > kTiny) {
      const float log_more = log1p_unit((more - less) / (more + less));  // log(more / m)
      const float log_less = less > 0.0f ? log_more - 4.0f * fabsf(x4) : 0.0f;
      js += 0.5f * (more * log_more + less * log_less);
    }
    kl += add_one_way(p, q, p4, q4, x4);
    kl_reverse += add_one_way(q, p, q4, p4, -x4);
  }

  __device__ static __forceinline__ float add_one_way(float p, float q, float p4, float q4,
                                                      float x4) {
    const float difference = kPerKlUnit * (q - p);
    // Infinity is infinity however small its share, also where p is zero in fp32.
    if (q4 == -INFINITY) return p4 > -INFINITY ? INFINITY : difference;
    return p > 0.0f ? difference - 4.0f * kPerKlUnit * p * x4 : difference;
  }
};

// What one level adds to the scores of a row.
struct Pair {
  Divergence divergence;
  float drift = 0.0f;
  int flip = 0;
  int padding = 0;
  long long rank_product = 0;

  __device__ __forceinline__ void merge(const Pair& other) {
    divergence.js += other.divergence.js;
    divergence.kl += other.divergence.kl;
    divergence.kl_reverse += other.divergence.kl_reverse;
    drift += other.drift;
    flip |= other.flip;
    rank_product += other.rank_product;
  }
};

struct Bernoulli {
  float p, log_p, not_p, log_not_p;
};

__device__ __forceinline__ Bernoulli sigmoid(float z) {
  const float e = expf(-fabsf(z));
  const float large = __fdividef(1.0f, 1.0f + e);
  const float small = e * large;
  const float softplus = log1p_unit(e);  // of -|z|
  const bool positive = z >= 0.0f;
  return {positive ? large : small, positive ? -softplus : z - softplus, positive ? small : large,
          positive ? -z - softplus : -softplus};
}

// What all classes of a row share of x = log(q / p) = (y - z) - (top_y - top_z) - of_sum. The first
// difference is exact for nearly equal rows; with an offset between the rows (|top_y - top_z| > 1)
// the distances to the tops are the more accurate ones.
struct LogRatio {
  bool offset;
  float of_top;
  float of_sum;

  __device__ __forceinline__ LogRatio(const Side& dense, const Side& pruned)
      : of_top(pruned.extremes.top - dense.extremes.top), of_sum(pruned.log_sum - dense.log_sum) {
    offset = !(fabsf(of_top) <= 1.0f);
  }
};

__device__ __forceinline__ void add_multiclass(const Side& dense, const Side& pruned,
                                               const LogRatio& ratio, float z, float y,
                                               Divergence* divergence) {
  const float p = dense.probability(z);
  const float q = pruned.probability(y);
  const float of_logits =
      ratio.offset ? (y - pruned.extremes.top) - (z - dense.extremes.top) : (y - z) - ratio.of_top;
  const float x = of_logits - ratio.of_sum;
  if (fabsf(x) < kNear) {
    divergence->add_near(p, q, tanh_half(x));
  } else {
    divergence->add_far(p, q, dense.quarter_log(z), pruned.quarter_log(y));
  }
}

__device__ __forceinline__ void add_outcome(float p, float q, float log_p, float log_q,
                                            Divergence* divergence) {
  const float x = log_q - log_p;
  if (fabsf(x) < kNear) {
    divergence->add_near(p, q, tanh_half(x));
  } else {
    divergence->add_far(p, q, 0.25f * log_p, 0.25f * log_q);
  }
}

__device__ __forceinline__ void add_multilabel(float z, float y, Divergence* divergence) {
  const Bernoulli a = sigmoid(z);
  const Bernoulli b = sigmoid(y);
  const float d = y - z;
  if (fabsf(d) < kNear) {
    // q - p = p (1 - p) (e^d - 1) / (1 + p (e^d - 1)): no difference of rounded probabilities.
    const float e = expm1_half(d);
    const float difference = __fdividef(a.p * a.not_p * e, fmaf(a.p, e, 1.0f));
    const float sum = a.p + b.p;
    const float not_sum = a.not_p + b.not_p;
    divergence->add_near(a.p, b.p, sum > kTiny ? __fdividef(difference, sum) : 0.0f);
    divergence->add_near(a.not_p, b.not_p,
                         not_sum > kTiny ? -__fdividef(difference, not_sum) : 0.0f);
  } else {
    add_outcome(a.p, b.p, a.log_p, b.log_p, divergence);
    add_outcome(a.not_p, b.not_p, a.log_not_p, b.log_not_p, divergence);
  }
}

template <bool kMultilabel>
__device__ __forceinline__ void add_pair(const Side& dense, const Side& pruned,
                                         const LogRatio& ratio, float z, float y, int rank_z,
                                         int rank_y, Pair* pair) {
  pair->rank_product += static_cast<long long>(rank_z) * rank_y;
  const float difference = dense.direction(z) - pruned.direction(y);
  pair->drift = fmaf(difference, difference, pair->drift);
  if constexpr (kMultilabel) {
    add_multilabel(z, y, &pair->divergence);
    pair->flip |= (z > 0.0f) != (y > 0.0f);
  } else {
    add_multiclass(dense, pruned, ratio, z, y, &pair->divergence);
  }
}

// ---------------------------------------------------------------------------- labels

// Lowest positive minus highest negative logit, the decision threshold 0 standing in for a side
// that the row does not have; mean binary cross-entropy over the known targets.
struct Targeted {
  float lowest_positive = INFINITY;
  float highest_negative = -INFINITY;
  float loss = 0.0f;  // in kKlUnit
  int positives = 0;
  int negatives = 0;

  __device__ __forceinline__ void add(float z, float target) {
    if (!(target == target)) return;  // unknown
    const bool positive = target > 0.5f;
    if (positive) {
      lowest_positive = fminf(lowest_positive, z);
      ++positives;
    } else {
      highest_negative = fmaxf(highest_negative, z);
      ++negatives;
    }
    const float against = positive ? -z : z;
    loss += kPerKlUnit * fmaxf(against, 0.0f) + kPerKlUnit * log1p_unit(expf(-fabsf(z)));
  }
  __device__ __forceinline__ void merge(const Targeted& other) {
    lowest_positive = fminf(lowest_positive, other.lowest_positive);
    highest_negative = fmaxf(highest_negative, other.highest_negative);
    loss += other.loss;
    positives += other.positives;
    negatives += other.negatives;
  }
};

__device__ __forceinline__ void supervise_multilabel(const Targeted& seen, Side* side) {
  const int known = seen.positives + seen.negatives;
  const double low = seen.positives > 0 ? seen.lowest_positive : 0.0f;
  const double high = seen.negatives > 0 ? seen.highest_negative : 0.0f;
  side->margin = known > 0 ? low - high : static_cast<double>(NAN);
  side->loss = static_cast<double>(seen.loss) * static_cast<double>(kKlUnit) / known;  // 0/0: NaN
}

// Margin and cross-entropy of the row's label; NaN for a label outside [0, classes), which is never
// used as an index. Without labels the margin is that of the top class.
__device__ __forceinline__ void supervise_multiclass(const DisagreementArgs& args, const void* base,
                                                     std::int64_t offset, std::int64_t row,
                                                     Side* side) {
  const Extremes& extremes = side->extremes;
  if (args.labels == nullptr) {
    side->margin = static_cast<double>(extremes.top) - static_cast<double>(extremes.second);
    side->loss = static_cast<double>(NAN);
    return;
  }
  const std::int64_t label = args.labels[row];
  if (label < 0 || label >= args.classes) {
    side->margin = side->loss = static_cast<double>(NAN);
    return;
  }
  const double of_label = load(args, base, offset + label);
  const float best_other = label == extremes.top_class ? extremes.second : extremes.top;
  side->margin = of_label - static_cast<double>(best_other);
  side->loss = (static_cast<double>(extremes.top) - of_label) + static_cast<double>(side->log_sum);
}

// ---------------------------------------------------------------------------- output

template <bool kMultilabel>
__device__ __forceinline__ void emit(const DisagreementArgs& args, const Side& dense,
                                     const Side& pruned, const Pair& pair, std::int64_t level,
                                     std::int64_t row) {
  bool bad = dense.extremes.bad || pruned.extremes.bad;
  if (!kMultilabel) {  // nothing but -inf: softmax has no value
    bad = bad || dense.extremes.top == -INFINITY || pruned.extremes.top == -INFINITY;
  }
  const bool targeted = kMultilabel && args.targets != nullptr;
  const bool no_margin = args.classes == 1 && !targeted;  // there is no other class
  const float share = kMultilabel ? 1.0f / static_cast<float>(args.classes) : 1.0f;
  const bool flip =
      kMultilabel ? pair.flip != 0 : dense.extremes.top_class != pruned.extremes.top_class;
  const double squares =
      static_cast<double>(dense.rank_square) * static_cast<double>(pruned.rank_square);

  const std::int64_t step = args.levels * args.rows;
  float* const out = args.out + level * args.rows + row;
  const auto put = [&](Score score, float value) { out[score * step] = bad ? NAN : value; };
  // Rounding can leave a term a hair below zero. (fmaxf would hide a NaN.)
  const auto not_negative = [](float value) { return value < 0.0f ? 0.0f : value; };
  put(kJs, not_negative(pair.divergence.js * share));
  put(kKl, not_negative(pair.divergence.kl * (kKlUnit * share)));
  put(kKlReverse, not_negative(pair.divergence.kl_reverse * (kKlUnit * share)));
  put(kSpearman, static_cast<float>(static_cast<double>(pair.rank_product) / sqrt(squares)));
  out[kFlip * step] = !bad && flip ? 1.0f : 0.0f;
  put(kMarginDense, no_margin ? NAN : static_cast<float>(dense.margin));
  put(kMarginPruned, no_margin ? NAN : static_cast<float>(pruned.margin));
  put(kDrift, sqrtf(pair.drift));
  put(kLossDense, static_cast<float>(dense.loss));
  put(kLossPruned, static_cast<float>(pruned.loss));
  put(kDamage, static_cast<float>(pruned.loss - dense.loss));
}

// ---------------------------------------------------------------------------- few classes

// kLanes lanes per row, class lane + k * kLanes in register k; registers beyond the row hold NaN.
template <int kLanes, int kPerLane, bool kMultilabel>
struct GroupRow {
  float z[kPerLane];
  int rank[kPerLane];  // average ranks, doubled and centred: #less - #greater
  Side side;

  __device__ __forceinline__ void prepare(const DisagreementArgs& args, const void* base,
                                          std::int64_t offset, std::int64_t row, int lane) {
    const int classes = static_cast<int>(args.classes);
    Group<kLanes> group;
    Extremes extremes;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int c = lane + k * kLanes;
      z[k] = c < classes ? load(args, base, offset + c) : NAN;
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (lane + k * kLanes < classes) extremes.add(z[k], lane + k * kLanes);
    }
    side.set_extremes(group.reduce(extremes));
    Sums sums;
    Targeted seen;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int c = lane + k * kLanes;
      if (c >= classes) continue;
      side.add(z[k], c, &sums);
      if (kMultilabel && args.targets != nullptr) {
        seen.add(z[k], args.targets[row * args.classes + c]);
      }
    }
    side.set_sums(group.reduce(sums));
    if (kMultilabel && args.targets != nullptr) {
      supervise_multilabel(group.reduce(seen), &side);
    } else if (kMultilabel) {
      side.margin = static_cast<double>(side.extremes.top) - side.extremes.second;
      side.loss = static_cast<double>(NAN);
    } else {
      supervise_multiclass(args, base, offset, row, &side);
    }
    count_ranks();
    RankSum square;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) square.value += static_cast<long long>(rank[k]) * rank[k];
    side.rank_square = group.reduce(square).value;
  }

  // NaN compares false both ways, so registers beyond the row count nothing and rank as 0.
  __device__ __forceinline__ void count_ranks() {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) rank[k] = 0;
#pragma unroll 4
    for (int source = 0; source < kLanes; ++source) {
#pragma unroll
      for (int from = 0; from < kPerLane; ++from) {
        const float other = __shfl_sync(kAllLanes, z[from], source, kLanes);
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          rank[k] += static_cast<int>(other < z[k]) - static_cast<int>(other > z[k]);
        }
      }
    }
  }
};

template <int kLanes, int kPerLane, bool kMultilabel>
__global__ void __launch_bounds__(kGroupThreads)
    disagreement_group_kernel(const DisagreementArgs args) {
  constexpr int kRowsPerBlock = kGroupThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int slot = static_cast<int>(threadIdx.x) / kLanes;
  const int classes = static_cast<int>(args.classes);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kRowsPerBlock;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock;
       first < args.rows; first += step) {
    // A group beyond the end repeats the last row, since every lane takes part in the shuffles.
    const std::int64_t wanted = first + slot;
    const std::int64_t row = wanted < args.rows ? wanted : args.rows - 1;
    GroupRow<kLanes, kPerLane, kMultilabel> dense;
    dense.prepare(args, args.dense, row * args.dense_row_stride, row, lane);
    for (std::int64_t level = 0; level < args.levels; ++level) {
      GroupRow<kLanes, kPerLane, kMultilabel> pruned;
      pruned.prepare(args, args.pruned,
                     level * args.pruned_level_stride + row * args.pruned_row_stride, row, lane);
      const LogRatio ratio(dense.side, pruned.side);
      Pair pair;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (lane + k * kLanes >= classes) continue;
        add_pair<kMultilabel>(dense.side, pruned.side, ratio, dense.z[k], pruned.z[k],
                              dense.rank[k], pruned.rank[k], &pair);
      }
      pair = Group<kLanes>().reduce(pair);
      if (lane == 0 && wanted < args.rows) {
        emit<kMultilabel>(args, dense.side, pruned.side, pair, level, row);
      }
    }
  }
}

// ---------------------------------------------------------------------------- many classes

// Unsigned integers in the order of the floats they come from.
__device__ __forceinline__ unsigned sortable(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ void order(unsigned* a, unsigned* b, bool ascending) {
  const unsigned low = min(*a, *b);
  const unsigned high = max(*a, *b);
  *a = ascending ? low : high;
  *b = ascending ? high : low;
}

// One merge step of the bitonic network (Batcher, 1968) over four neighbouring keys per lane, for
// strides below kTile: `index` is that of the lane's first key, `size` the length of the runs.
__device__ __forceinline__ void merge_tile(uint4* keys, unsigned index, unsigned size) {
  const unsigned half = size / 2;
  for (unsigned stride = half < kTile / 2 ? half : kTile / 2; stride >= 4; stride /= 2) {
    const bool keep_low = ((index & stride) == 0) == ((index & size) == 0);
    const int mask = static_cast<int>(stride / 4);
    const uint4 other = exchange(*keys, mask);
    keys->x = keep_low ? min(keys->x, other.x) : max(keys->x, other.x);
    keys->y = keep_low ? min(keys->y, other.y) : max(keys->y, other.y);
    keys->z = keep_low ? min(keys->z, other.z) : max(keys->z, other.z);
    keys->w = keep_low ? min(keys->w, other.w) : max(keys->w, other.w);
  }
  const bool ascending = (index & size) == 0;
  if (size >= 4) {
    order(&keys->x, &keys->z, ascending);
    order(&keys->y, &keys->w, ascending);
  }
  order(&keys->x, &keys->y, ascending);
  order(&keys->z, &keys->w, size == 2 ? false : ascending);
}

// Sorts `count` keys in shared memory, a power of two and at least kTile.
__device__ void sort_keys(unsigned* keys, unsigned count) {
  uint4* const vectors = reinterpret_cast<uint4*>(keys);
  const unsigned quads = count / 4;
  for (unsigned i = threadIdx.x; i < quads; i += blockDim.x) {
    uint4 mine = vectors[i];
    for (unsigned size = 2; size <= kTile; size *= 2) merge_tile(&mine, 4 * i, size);
    vectors[i] = mine;
  }
  for (unsigned size = 2 * kTile; size <= count; size *= 2) {
    for (unsigned stride = size / 2; stride >= kTile; stride /= 2) {
      __syncthreads();
      const unsigned quad_stride = stride / 4;
      for (unsigned i = threadIdx.x; i < quads / 2; i += blockDim.x) {
        const unsigned low = i & (quad_stride - 1);
        const unsigned at = 2 * (i - low) + low;
        const bool ascending = (4 * at & size) == 0;
        uint4 a = vectors[at];
        uint4 b = vectors[at + quad_stride];
        order(&a.x, &b.x, ascending);
        order(&a.y, &b.y, ascending);
        order(&a.z, &b.z, ascending);
        order(&a.w, &b.w, ascending);
        vectors[at] = a;
        vectors[at + quad_stride] = b;
      }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < quads; i += blockDim.x) {
      uint4 mine = vectors[i];
      merge_tile(&mine, 4 * i, size);
      vectors[i] = mine;
    }
  }
  __syncthreads();
}

// The first position in [begin, end) of sorted `keys` whose key is not below `key`.
__device__ __forceinline__ int lower_bound(const unsigned* keys, int begin, int end, unsigned key) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// #less + #not greater - classes, of a value that is in the row.
__device__ __forceinline__ int find_rank(const unsigned* keys, int classes, float value) {
  const unsigned key = sortable(value);
  const int less = lower_bound(keys, 0, classes, key);
  int not_greater = less + 1;
  // A tie costs the second search; a key of all ones is a NaN's, in a row that has no scores.
  if (not_greater < classes && keys[not_greater] == key && key != UINT_MAX) {
    not_greater = lower_bound(keys, not_greater, classes, key + 1);
  }
  return less + not_greater - classes;
}

// Everything of a row but its ranks, which are left to the caller: the keys are sorted after this.
template <typename T, bool kMultilabel>
__device__ void prepare_row(const DisagreementArgs& args, const void* base, std::int64_t offset,
                            std::int64_t row, unsigned* keys, int count, Block block, Side* side) {
  const int classes = static_cast<int>(args.classes);
  const T* const logits = static_cast<const T*>(base) + offset;
  const int tid = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  Extremes extremes;
#pragma unroll 4
  for (int c = tid; c < classes; c += threads) {
    const float z = load(logits, c);
    extremes.add(z, c);
    keys[c] = sortable(z);
  }
  for (int c = classes + tid; c < count; c += threads) keys[c] = UINT_MAX;
  side->set_extremes(block.reduce(extremes));  // its barriers also publish the keys
  Sums sums;
  Targeted seen;
  const bool targeted = kMultilabel && args.targets != nullptr;
#pragma unroll 1  // two classes at once spill on sm_90a, whose limit here is 64 registers
  for (int c = tid; c < classes; c += threads) {
    const float z = load(logits, c);
    side->add(z, c, &sums);
    if (targeted) seen.add(z, args.targets[row * args.classes + c]);
  }
  side->set_sums(block.reduce(sums));
  if (targeted) {
    supervise_multilabel(block.reduce(seen), side);
  } else if (kMultilabel) {
    side->margin = static_cast<double>(side->extremes.top) - side->extremes.second;
    side->loss = static_cast<double>(NAN);
  } else {
    supervise_multiclass(args, base, offset, row, side);
  }
  sort_keys(keys, static_cast<unsigned>(count));
}

// Shared memory: `count` keys, then the dense model's ranks.
extern __shared__ uint4 row_memory[];

template <typename T, bool kMultilabel>
__global__ void __launch_bounds__(kRowMaxThreads, 2)
    disagreement_row_kernel(const DisagreementArgs args, int count) {
  __shared__ std::uint64_t scratch[kRowMaxWarps][Block::kWords / 2];
  unsigned* const keys = reinterpret_cast<unsigned*>(row_memory);
  std::int16_t* const dense_ranks = reinterpret_cast<std::int16_t*>(keys + count);
  const Block block{scratch};
  const int classes = static_cast<int>(args.classes);
  const int tid = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);

  for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    Side dense;
    const std::int64_t dense_offset = row * args.dense_row_stride;
    const T* const z_row = static_cast<const T*>(args.dense) + dense_offset;
    prepare_row<T, kMultilabel>(args, args.dense, dense_offset, row, keys, count, block, &dense);
    RankSum dense_square;
    for (int c = tid; c < classes; c += threads) {
      const int rank = find_rank(keys, classes, load(z_row, c));
      dense_ranks[c] = static_cast<std::int16_t>(rank);  // read by this thread only
      dense_square.value += static_cast<long long>(rank) * rank;
    }
    dense.rank_square = Block(block).reduce(dense_square).value;  // and the keys are free again

    for (std::int64_t level = 0; level < args.levels; ++level) {
      Side pruned;
      const std::int64_t offset = level * args.pruned_level_stride + row * args.pruned_row_stride;
      const T* const y_row = static_cast<const T*>(args.pruned) + offset;
      prepare_row<T, kMultilabel>(args, args.pruned, offset, row, keys, count, block, &pruned);
      const LogRatio ratio(dense, pruned);
      Pair pair;
      RankSum pruned_square;
      for (int c = tid; c < classes; c += threads) {
        const float z = load(z_row, c);
        const float y = load(y_row, c);
        const int rank = find_rank(keys, classes, y);
        pruned_square.value += static_cast<long long>(rank) * rank;
        add_pair<kMultilabel>(dense, pruned, ratio, z, y, dense_ranks[c], rank, &pair);
      }
      pruned.rank_square = Block(block).reduce(pruned_square).value;
      pair = Block(block).reduce(pair);
      if (tid == 0) emit<kMultilabel>(args, dense, pruned, pair, level, row);
    }
  }
}

// ---------------------------------------------------------------------------- launches

Status to_status(cudaError_t error) {
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

unsigned grid(std::int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

cudaLaunchConfig_t launch_config(unsigned blocks, unsigned threads, std::size_t shared,
                                 void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

template <int kLanes, int kPerLane>
Status launch_group(const DisagreementArgs& args, void* stream) {
  constexpr int kRowsPerBlock = kGroupThreads / kLanes;
  const std::int64_t blocks = (args.rows - 1) / kRowsPerBlock + 1;
  const cudaLaunchConfig_t config = launch_config(grid(blocks), kGroupThreads, 0, stream);
  const auto kernel = args.task == Task::kMultilabel
                          ? disagreement_group_kernel<kLanes, kPerLane, true>
                          : disagreement_group_kernel<kLanes, kPerLane, false>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  return to_status(error != cudaSuccess ? error : cudaGetLastError());
}

template <typename T>
Status launch_row(const DisagreementArgs& args, void* stream) {
  int count = 2 * kTile;
  while (count < args.classes) count *= 2;
  const std::size_t shared = sizeof(unsigned) * static_cast<std::size_t>(count) +
                             sizeof(std::int16_t) * static_cast<std::size_t>(args.classes);
  // A thread per eight keys: one vector pair in each step through shared memory. Rows of few
  // classes then leave room for many blocks on a multiprocessor.
  const int wanted = count / 8;
  const int threads = wanted < 64 ? 64 : (wanted > kRowMaxThreads ? kRowMaxThreads : wanted);
  const auto kernel = args.task == Task::kMultilabel ? disagreement_row_kernel<T, true>
                                                     : disagreement_row_kernel<T, false>;
  constexpr std::size_t kDefaultLimit = 48 * 1024;  // more must be asked for
  constexpr std::size_t kStatic = sizeof(std::uint64_t) * kRowMaxWarps * Block::kWords / 2;
  if (shared + kStatic > kDefaultLimit) {
    int device = 0;
    int limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error != cudaSuccess) return to_status(error);
    if (shared + kStatic > static_cast<std::size_t>(limit)) {
      return {"Expected fewer classes: the ranks of one row exceed this GPU's shared memory"};
    }
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
    if (error != cudaSuccess) return to_status(error);
  }
  const cudaLaunchConfig_t config =
      launch_config(grid(args.rows), static_cast<unsigned>(threads), shared, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args, count);
  return to_status(error != cudaSuccess ? error : cudaGetLastError());
}

}  // namespace

Status disagreement(const DisagreementArgs& args, void* stream) {
  if (args.rows == 0 || args.levels == 0) return {};  // a launch of zero blocks is an error
  if (args.classes > kMaxClasses) return {"Expected at most 16384 classes"};
  if (args.classes <= 8) return launch_group<8, 1>(args, stream);
  if (args.classes <= 16) return launch_group<8, 2>(args, stream);
  if (args.classes <= 24) return launch_group<8, 3>(args, stream);
  if (args.classes <= 32) return launch_group<8, 4>(args, stream);
  if (args.classes <= 64) return launch_group<16, 4>(args, stream);
  if (args.classes <= kGroupMaxClasses) return launch_group<32, 4>(args, stream);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_row<float>(args, stream);
    case DType::kBFloat16:
      return launch_row<BFloat16Bits>(args, stream);
    case DType::kFloat16:
      return launch_row<__half>(args, stream);
  }
  return {"Expected a known dtype"};
}

}  // namespace fastpie::cuda
