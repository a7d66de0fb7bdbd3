// `alias_table`, built by sweeping. Every entry below the mean weight is filled up to the mean by a
// donor, an entry of at least the mean; a donor that has given so much that it is itself below is
// filled up by the next one. One index runs over the entries below the mean, one over the donors,
// so there are no lists of either (Huebschle-Schneider and Sanders, arXiv 1903.00227; the method of
// aliases is Walker's, 1977, and Vose's, 1991).
//
// Memory binds, and each step needs the one before: there is nothing for wider instruction sets.
#include "fastpie/alias_table.h"

#include <cmath>

namespace fastpie {
namespace {

// A sum kept in two numbers, high and low: about 106 bits.
struct Double2 {
  double high = 0.0;
  double low = 0.0;

  void add(double x) {  // Knuth's two-sum
    const double sum = high + x;
    const double part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
  void normalize() {
    const double sum = high + low;
    low -= sum - high;
    high = sum;
  }
};

class Sweep {
 public:
  explicit Sweep(const AliasTableArgs& args) : args_(args) {}

  Status run() {
    const Status status = find_scale();
    if (!status.ok()) return status;
    Double2 sum;
    for (std::int64_t i = 0; i < args_.count; ++i) sum.add(weight(i));
    sum.normalize();
    const auto n = static_cast<double>(args_.count);
    mean_.high = sum.high / n;
    mean_.low = (std::fma(-mean_.high, n, sum.high) + sum.low) / n;
    mean_.normalize();  // high is the nearest number: not above the largest weight

    std::int64_t donor = next_donor(-1);  // the largest weight is one
    std::int64_t next = next_donor(donor);
    Double2 left{weight(donor), 0.0};  // what the donor has for itself
    for (std::int64_t i = next_below(-1); i < args_.count; i = next_below(i)) {
      give(i, Double2{weight(i), 0.0}, donor, &left);
      while (next < args_.count && below_mean(left)) {
        Double2 fresh{weight(next), 0.0};
        give(donor, left, next, &fresh);
        donor = next;
        next = next_donor(donor);
        left = fresh;
      }
    }
    // Those that have not given all are at the mean but for rounding.
    for (; donor < args_.count; donor = next, next = next_donor(next)) {
      args_.probability[donor] = 1.0;
      args_.alias[donor] = donor;
    }
    return {};
  }

 private:
  // The largest weight becomes [1, 2): no sum overflows, and subnormal weights keep their bits.
  Status find_scale() {
    double largest = 0.0;
    for (std::int64_t i = 0; i < args_.count; ++i) {
      const double w = args_.weights[i];
      if (!(w >= 0.0) || std::isinf(w)) return {"Expected weights that are finite and at least 0"};
      if (w > largest) largest = w;
    }
    if (largest == 0.0) return {"Expected at least one weight above 0"};
    const int exponent = -std::ilogb(largest);  // up to 1074: two steps
    scale_[0] = std::ldexp(1.0, exponent / 2);
    scale_[1] = std::ldexp(1.0, exponent - exponent / 2);
    return {};
  }

  double weight(std::int64_t i) const { return args_.weights[i] * scale_[0] * scale_[1]; }

  // By the high part alone: all that matters is that an entry is on one side only.
  std::int64_t next_below(std::int64_t i) const {
    do ++i;
    while (i < args_.count && weight(i) >= mean_.high);
    return i;
  }
  std::int64_t next_donor(std::int64_t i) const {
    do ++i;
    while (i < args_.count && weight(i) < mean_.high);
    return i;
  }
  bool below_mean(const Double2& x) const {
    return (x.high - mean_.high) + (x.low - mean_.low) < 0.0;
  }

  // Fills entry i, which holds `own`, up to the mean from the donor's `left`. A probability is
  // rounded; what that takes from or adds to the entry is made good by the next one that it
  // changes by less than a few roundings, so that the errors of many entries do not meet in their
  // common donor.
  void give(std::int64_t i, Double2 own, std::int64_t donor, Double2* left) {
    double p = 0.0;
    if (own.high > 0.0) {
      if (std::fabs(carry_) <= own.high * 0x1p-50) {
        own.add(carry_);
        carry_ = 0.0;
      }
      own.normalize();
      p = own.high / mean_.high;
      if (p > 1.0) p = 1.0;
    }
    const double kept = p * mean_.high;
    const double kept_low = std::fma(p, mean_.high, -kept) + p * mean_.low;
    carry_ += (own.high - kept) + (own.low - kept_low);
    args_.probability[i] = p;
    args_.alias[i] = p < 1.0 ? donor : i;
    left->add(-mean_.high);
    left->add(kept);
    left->add(kept_low - mean_.low);
    left->normalize();
  }

  AliasTableArgs args_;
  double scale_[2] = {1.0, 1.0};
  Double2 mean_;
  double carry_ = 0.0;
};

}  // namespace

Status alias_table(const AliasTableArgs& args) {
  return args.count == 0 ? Status{} : Sweep(args).run();
}

}  // namespace fastpie
