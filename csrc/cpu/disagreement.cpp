// CPU kernel of `disagreement`. One source, compiled once per instruction set (see isa.h).
//
// As many rows at a time as a register has lanes are transposed, [classes][lanes] in fp64, so that
// every step is a vertical operation: sums run over the classes in order whatever the instruction
// set and the thread count (same bits everywhere), and a row of 2 classes uses the vector as well
// as one of 10,000. The dense side is prepared once for all levels.
#include "fastpie/disagreement.h"

#include <cstdlib>
#include <cstring>

#include "element.h"
#include "parallel.h"
#include "vec.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

// Above this many classes ranks come from a radix sort, up to it from counting. Both cost about the
// same here: 5,000 rows took 15.8 ms (AVX-512) and 24.6 ms (AVX2) with 128 classes by
// counting, 19.4 and 20.7 ms with 129 by sorting (all scores, 2 threads of Zen 4).
constexpr std::int64_t kCountingMaxClasses = 128;
constexpr int kRadixBits = 11;
constexpr int kRadixPasses = 3;
constexpr int kRadixSize = 1 << kRadixBits;

// ---------------------------------------------------------------------------- reading logits

template <typename T>
void load_rows(const void* base, std::int64_t row_stride, std::int64_t first, int valid,
               std::int64_t classes, Vec* z) {
  const T* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = first + (lane < valid ? lane : valid - 1);
    rows[lane] = static_cast<const T*>(base) + row * row_stride;
  }
  for (std::int64_t c = 0; c < classes; ++c) {
    Vec v;
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = to_float(rows[lane][c]);
    z[c] = v + 0.0;  // -0 becomes +0, so that the two tie
  }
}

void load(const DisagreementArgs& args, const void* base, std::int64_t row_stride,
          std::int64_t first, int valid, Vec* z) {
  switch (args.dtype) {
    case DType::kFloat32:
      return load_rows<float>(base, row_stride, first, valid, args.classes, z);
    case DType::kBFloat16:
      return load_rows<BFloat16>(base, row_stride, first, valid, args.classes, z);
    case DType::kFloat16:
      return load_rows<Float16>(base, row_stride, first, valid, args.classes, z);
  }
}

// ---------------------------------------------------------------------------- ranks

// Average ranks, doubled and centred: (#less + #not greater) - C, an exact integer whose mean over
// the row is zero.
void ranks_by_counting(const Vec* z, std::int64_t classes, Vec* rank) {
  for (std::int64_t i = 0; i < classes; ++i) {
    Mask count{};
    for (std::int64_t j = 0; j < classes; ++j) count -= (z[j] < z[i]) + (z[j] <= z[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      rank[i][lane] = static_cast<double>(count[lane] - classes);
    }
  }
}

// Unsigned integers in the order of the floats they come from.
inline std::uint32_t sortable(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// `items` and `scratch` hold `classes` values each, `histogram` kRadixPasses * kRadixSize.
void ranks_by_sorting(const Vec* z, std::int64_t classes, int lane, std::uint64_t* items,
                      std::uint64_t* scratch, std::uint32_t* histogram, Vec* rank) {
  __builtin_memset(histogram, 0, sizeof(std::uint32_t) * kRadixPasses * kRadixSize);
  for (std::int64_t c = 0; c < classes; ++c) {
    const std::uint32_t key = sortable(static_cast<float>(z[c][lane]));
    items[c] = (static_cast<std::uint64_t>(key) << 32) | static_cast<std::uint64_t>(c);
    for (int pass = 0; pass < kRadixPasses; ++pass) {
      ++histogram[pass * kRadixSize + ((key >> (pass * kRadixBits)) & (kRadixSize - 1))];
    }
  }
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    std::uint32_t* const offsets = histogram + pass * kRadixSize;
    const int shift = 32 + pass * kRadixBits;
    if (offsets[(items[0] >> shift) & (kRadixSize - 1)] == classes) continue;  // one digit only
    std::uint32_t total = 0;
    for (int digit = 0; digit < kRadixSize; ++digit) {
      const std::uint32_t here = offsets[digit];
      offsets[digit] = total;
      total += here;
    }
    for (std::int64_t c = 0; c < classes; ++c) {
      scratch[offsets[(items[c] >> shift) & (kRadixSize - 1)]++] = items[c];
    }
    std::uint64_t* const swapped = items;
    items = scratch;
    scratch = swapped;
  }
  for (std::int64_t begin = 0; begin < classes;) {
    std::int64_t end = begin + 1;
    while (end < classes && (items[end] >> 32) == (items[begin] >> 32)) ++end;
    const double tied = static_cast<double>(begin + end - classes);  // #less + #not greater - C
    for (; begin < end; ++begin) rank[items[begin] & 0xffffffffu][lane] = tied;
  }
}

// ---------------------------------------------------------------------------- one model's rows

struct Side {
  Vec* z;       // logits
  Vec* p;       // multiclass: softmax
  Vec* rank;    // doubled centred ranks
  Mask bad;     // rows whose scores are NaN
  Vec log_sum;  // multiclass: log(sum(exp(z - top))); added to a huge top it would be lost
  Vec norm;     // L2 norm of the logits, at least 1e-12 as in torch.nn.functional.normalize
  Vec rank_square;
  Vec top;     // largest logit, the first of equal ones
  Vec second;  // largest of the others
  Vec top_class;
};

struct Workspace {
  Side dense;
  Side pruned;
  std::uint64_t* items;
  std::uint64_t* scratch;
  std::uint32_t* histogram;
};

void prepare(const DisagreementArgs& args, int valid, const Workspace& space, Side* side) {
  const std::int64_t classes = args.classes;
  const Vec* const z = side->z;
  Mask bad{};
  Vec top = splat(-kInf), second = splat(-kInf), top_class{}, square{};
  for (std::int64_t c = 0; c < classes; ++c) {
    bad |= (z[c] != z[c]) | (z[c] == kInf);
    const Mask greater = z[c] > top;
    second = select(greater, top, vmax(second, z[c]));
    top_class = select(greater, splat(static_cast<double>(c)), top_class);
    top = select(greater, z[c], top);
    square += z[c] * z[c];
  }
  side->norm = vmax(vsqrt(square), splat(1e-12));
  if (args.task == Task::kMulticlass) {
    bad |= top == -kInf;
    Vec sum{};
    for (std::int64_t c = 0; c < classes; ++c) {
      side->p[c] = vexp(z[c] - top);
      sum += side->p[c];
    }
    for (std::int64_t c = 0; c < classes; ++c) side->p[c] = side->p[c] / sum;
    side->log_sum = vlog(sum);
  }
  side->bad = bad;
  side->top = top;
  side->second = second;
  side->top_class = top_class;
  if (classes <= kCountingMaxClasses) {
    ranks_by_counting(z, classes, side->rank);
  } else {
    for (int lane = 0; lane < valid; ++lane) {
      ranks_by_sorting(z, classes, lane, space.items, space.scratch, space.histogram, side->rank);
    }
    for (int lane = valid; lane < kLanes; ++lane) {  // defined values in the lanes nobody reads
      for (std::int64_t c = 0; c < classes; ++c) side->rank[c][lane] = 0.0;
    }
  }
  Vec rank_square{};
  for (std::int64_t c = 0; c < classes; ++c) rank_square += side->rank[c] * side->rank[c];
  side->rank_square = rank_square;
}

// ---------------------------------------------------------------------------- scores

// p * log(p / q) + q-side alike, and their Jensen-Shannon form, for one class.
struct Divergence {
  Vec js{};
  Vec kl{};
  Vec kl_reverse{};

  inline void add(Vec p, Vec log_p, Vec q, Vec log_q) {
    const Vec m = 0.5 * (p + q);
    // JS = sum m * phi(t), t = (q - p) / (q + p), phi(t) = ((1-t) log(1-t) + (1+t) log(1+t)) / 2.
    // Near 0 the two terms cancel; there the series keeps the relative accuracy.
    const Vec safe_m = select(m > 0.0, m, splat(1.0));
    const Vec t = 0.5 * (q - p) / safe_m;
    const Vec t2 = t * t;
    const Vec series =
        t2 * (0.5 + t2 * (1.0 / 12.0 + t2 * (1.0 / 30.0 + t2 * (1.0 / 56.0 + t2 * (1.0 / 90.0)))));
    const Vec less = 1.0 - t, more = 1.0 + t;
    const Vec less_term =
        select(less > 0.0, less * vlog(select(less > 0.0, less, splat(1.0))), Vec{});
    const Vec more_term =
        select(more > 0.0, more * vlog(select(more > 0.0, more, splat(1.0))), Vec{});
    js += m * select(t2 < 1e-4, series, 0.5 * (less_term + more_term));
    kl += one_way(p, log_p, log_q);
    kl_reverse += one_way(q, log_q, log_p);
  }

  // Infinity is infinity however small its share, also where that is zero in fp64.
  static inline Vec one_way(Vec p, Vec log_p, Vec log_q) {
    const Mask infinite = (log_q == -kInf) & (log_p > -kInf);
    return select(infinite, splat(kInf), select(p > 0.0, p * (log_p - log_q), Vec{}));
  }
};

struct Bernoulli {
  Vec p, log_p, not_p, log_not_p;
};

inline Bernoulli sigmoid(Vec z) {
  const Vec e = vexp(-vabs(z));
  const Vec large = 1.0 / (1.0 + e);
  const Vec small = e * large;
  const Vec softplus = vlog(1.0 + e);  // of -|z|
  const Mask positive = z >= 0.0;
  return {select(positive, large, small), select(positive, -softplus, z - softplus),
          select(positive, small, large), select(positive, -z - softplus, -softplus)};
}

void put(const DisagreementArgs& args, Score score, std::int64_t level, std::int64_t first,
         int valid, Vec value) {
  float* const out = args.out + (score * args.levels + level) * args.rows + first;
  for (int lane = 0; lane < valid; ++lane) out[lane] = static_cast<float>(value[lane]);
}

struct Supervised {
  Vec margin;
  Vec loss;
};

// Margin and cross-entropy of a row's label; NaN for a label outside [0, classes).
Supervised multiclass_supervised(const DisagreementArgs& args, const Side& side, std::int64_t first,
                                 int valid) {
  Vec of_label = splat(kNan), best_other = splat(kNan);
  for (int lane = 0; lane < valid; ++lane) {
    const std::int64_t label = args.labels[first + lane];
    if (label < 0 || label >= args.classes) continue;
    of_label[lane] = side.z[label][lane];
    best_other[lane] = static_cast<std::int64_t>(side.top_class[lane]) == label ? side.second[lane]
                                                                                : side.top[lane];
  }
  return {of_label - best_other, side.log_sum - (of_label - side.top)};
}

// Lowest positive minus highest negative logit, the decision threshold 0 standing in for a side
// that the row does not have; mean binary cross-entropy over the known targets.
Supervised multilabel_supervised(const DisagreementArgs& args, const Side& side, std::int64_t first,
                                 int valid) {
  Vec lowest_positive = splat(kInf), highest_negative = splat(-kInf), loss{}, known{};
  Mask any_negative{};
  for (std::int64_t c = 0; c < args.classes; ++c) {
    Vec target;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t row = first + (lane < valid ? lane : valid - 1);
      target[lane] = args.targets[row * args.classes + c];
    }
    const Vec z = side.z[c];
    const Mask is_known = target == target;
    const Mask positive = target > 0.5;
    lowest_positive = select(positive, vmin(lowest_positive, z), lowest_positive);
    const Mask negative = is_known & ~positive;
    highest_negative = select(negative, vmax(highest_negative, z), highest_negative);
    any_negative |= negative;
    const Bernoulli b = sigmoid(z);
    loss -= select(is_known, select(positive, b.log_p, b.log_not_p), Vec{});
    known += select(is_known, splat(1.0), Vec{});
  }
  const Mask none = known == 0.0;
  // A logit is never +inf here (such rows are flagged), so +inf says that no positive was seen.
  const Vec margin = select(lowest_positive < kInf, lowest_positive, Vec{}) -
                     select(any_negative, highest_negative, Vec{});
  return {select(none, splat(kNan), margin), select(none, splat(kNan), loss / known)};
}

void score_level(const DisagreementArgs& args, const Workspace& space, std::int64_t level,
                 std::int64_t first, int valid) {
  const Side& dense = space.dense;
  const Side& pruned = space.pruned;
  Divergence divergence;
  Vec rank_product{}, drift{}, flip{};
  for (std::int64_t c = 0; c < args.classes; ++c) {
    rank_product += dense.rank[c] * pruned.rank[c];
    const Vec difference = dense.z[c] / dense.norm - pruned.z[c] / pruned.norm;
    drift += difference * difference;
    if (args.task == Task::kMulticlass) {
      divergence.add(dense.p[c], (dense.z[c] - dense.top) - dense.log_sum, pruned.p[c],
                     (pruned.z[c] - pruned.top) - pruned.log_sum);
    } else {
      const Bernoulli p = sigmoid(dense.z[c]), q = sigmoid(pruned.z[c]);
      divergence.add(p.p, p.log_p, q.p, q.log_p);
      divergence.add(p.not_p, p.log_not_p, q.not_p, q.log_not_p);
      flip = select((dense.z[c] > 0.0) ^ (pruned.z[c] > 0.0), splat(1.0), flip);
    }
  }
  const bool multilabel = args.task == Task::kMultilabel;
  if (multilabel) {
    const double classes = static_cast<double>(args.classes);
    divergence.js /= classes;
    divergence.kl /= classes;
    divergence.kl_reverse /= classes;
  } else {
    flip = select(dense.top_class != pruned.top_class, splat(1.0), Vec{});
  }
  const Vec spearman = rank_product / vsqrt(dense.rank_square * pruned.rank_square);

  Supervised of_dense{dense.top - dense.second, splat(kNan)};
  Supervised of_pruned{pruned.top - pruned.second, splat(kNan)};
  if (multilabel && args.targets != nullptr) {
    of_dense = multilabel_supervised(args, dense, first, valid);
    of_pruned = multilabel_supervised(args, pruned, first, valid);
  } else if (!multilabel && args.labels != nullptr) {
    of_dense = multiclass_supervised(args, dense, first, valid);
    of_pruned = multiclass_supervised(args, pruned, first, valid);
  }
  if (args.classes == 1 && !(multilabel && args.targets != nullptr)) {
    of_dense.margin = of_pruned.margin = splat(kNan);  // there is no other class
  }

  const Mask bad = dense.bad | pruned.bad;
  const auto emit = [&](Score score, Vec value) {
    put(args, score, level, first, valid, select(bad, splat(kNan), value));
  };
  // Rounding can leave a divergence of identical rows a hair below zero.
  emit(kJs, select(divergence.js < 0.0, Vec{}, divergence.js));
  emit(kKl, select(divergence.kl < 0.0, Vec{}, divergence.kl));
  emit(kKlReverse, select(divergence.kl_reverse < 0.0, Vec{}, divergence.kl_reverse));
  emit(kSpearman, spearman);
  put(args, kFlip, level, first, valid, select(bad, Vec{}, flip));
  emit(kMarginDense, of_dense.margin);
  emit(kMarginPruned, of_pruned.margin);
  emit(kDrift, vsqrt(drift));
  emit(kLossDense, of_dense.loss);
  emit(kLossPruned, of_pruned.loss);
  emit(kDamage, of_pruned.loss - of_dense.loss);
}

// ---------------------------------------------------------------------------- threads

struct Context {
  const DisagreementArgs* args;
  bool out_of_memory;
};

std::size_t workspace_bytes(std::int64_t classes) {
  const auto n = static_cast<std::size_t>(classes);
  return 6 * n * sizeof(Vec) + 2 * n * sizeof(std::uint64_t) +
         kRadixPasses * kRadixSize * sizeof(std::uint32_t) + sizeof(Vec);
}

void score_range(std::int64_t begin, std::int64_t end, void* context_pointer) {
  auto* const context = static_cast<Context*>(context_pointer);
  const DisagreementArgs& args = *context->args;
  void* const memory = std::malloc(workspace_bytes(args.classes));
  if (memory == nullptr) {
    __atomic_store_n(&context->out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  const auto address = (reinterpret_cast<std::uintptr_t>(memory) + sizeof(Vec) - 1) & -sizeof(Vec);
  Vec* next = reinterpret_cast<Vec*>(address);
  Workspace space{};
  Side* const sides[] = {&space.dense, &space.pruned};
  for (Side* const side : sides) {
    side->z = next;
    side->p = next + args.classes;
    side->rank = next + 2 * args.classes;
    next += 3 * args.classes;
  }
  space.items = reinterpret_cast<std::uint64_t*>(next);
  space.scratch = space.items + args.classes;
  space.histogram = reinterpret_cast<std::uint32_t*>(space.scratch + args.classes);

  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t first = block * kLanes;
    const int valid = static_cast<int>(args.rows - first < kLanes ? args.rows - first : kLanes);
    load(args, args.dense, args.dense_row_stride, first, valid, space.dense.z);
    prepare(args, valid, space, &space.dense);
    const std::size_t element = args.dtype == DType::kFloat32 ? 4 : 2;
    for (std::int64_t level = 0; level < args.levels; ++level) {
      const char* const pruned =
          static_cast<const char*>(args.pruned) +
          static_cast<std::int64_t>(element) * level * args.pruned_level_stride;
      load(args, pruned, args.pruned_row_stride, first, valid, space.pruned.z);
      prepare(args, valid, space, &space.pruned);
      score_level(args, space, level, first, valid);
    }
  }
  std::free(memory);
}

}  // namespace

Status disagreement(const DisagreementArgs& args, int threads) {
  Context context{&args, false};
  const std::int64_t blocks = (args.rows + kLanes - 1) / kLanes;
  // Blocks of about 32 Ki logits: enough work to be worth a thread, small enough to share out.
  const std::int64_t logits = kLanes * args.classes * (args.levels + 1);
  const std::int64_t grain = logits >= 32768 ? 1 : 32768 / (logits < 1 ? 1 : logits);
  parallel_for(blocks, grain, threads, &score_range, &context);
  if (context.out_of_memory) return {"Out of memory for the workspace of one thread"};
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
