#include "tests/adversary/truth_kernel.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/adversary/truth_kernel.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvservice::adversary {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DoubleTag = hn::CappedTag<double, kTruthLanes>;
using Doubles = hn::Vec<DoubleTag>;
constexpr uint32_t kWidth = static_cast<uint32_t>(hn::MaxLanes(DoubleTag()));
constexpr uint32_t kParts = kTruthLanes / kWidth;

HWY_INLINE Doubles LoadFloats(const float* from) {
  const DoubleTag d;
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, DoubleTag>(), from));
}

// Eight sums with what they lost.
class PairSums {
 public:
  HWY_INLINE PairSums() {
    for (uint32_t i = 0; i < kParts; ++i) high_[i] = low_[i] = hn::Zero(DoubleTag());
  }
  // Adds x, and its rounding error and `more` to what was lost (Knuth).
  HWY_INLINE void Add(uint32_t part, Doubles x, Doubles more) {
    const Doubles before = high_[part];
    const Doubles sum = hn::Add(before, x);
    const Doubles x_part = hn::Sub(sum, before);
    const Doubles error = hn::Add(hn::Sub(before, hn::Sub(sum, x_part)), hn::Sub(x, x_part));
    high_[part] = sum;
    low_[part] = hn::Add(low_[part], hn::Add(error, more));
  }
  HWY_INLINE void Store(double* high, double* low) const {
    for (uint32_t i = 0; i < kParts; ++i) {
      hn::StoreU(high_[i], DoubleTag(), high + i * kWidth);
      hn::StoreU(low_[i], DoubleTag(), low + i * kWidth);
    }
  }

 private:
  Doubles high_[kParts];
  Doubles low_[kParts];
};

void ExactDotsTarget(uint32_t dim, const float* q, const float* k, uint32_t group_count,
                     double* high, double* low, double* size) {
  const DoubleTag d;
  for (uint32_t group = 0; group < group_count; ++group) {
    const float* const keys = k + size_t{group} * dim * kTruthLanes;
    PairSums sums;
    Doubles sizes[kParts];
    for (Doubles& one : sizes) one = hn::Zero(d);
    for (uint32_t c = 0; c < dim; ++c) {
      const Doubles query = hn::Set(d, static_cast<double>(q[c]));
      for (uint32_t i = 0; i < kParts; ++i) {
        const Doubles product =
            hn::Mul(query, LoadFloats(keys + size_t{c} * kTruthLanes + i * kWidth));
        sums.Add(i, product, hn::Zero(d));
        sizes[i] = hn::Add(sizes[i], hn::Abs(product));
      }
    }
    const size_t at = size_t{group} * kTruthLanes;
    sums.Store(high + at, low + at);
    for (uint32_t i = 0; i < kParts; ++i) hn::StoreU(sizes[i], d, size + at + i * kWidth);
  }
}

LaneSums SquaresTarget(uint32_t count, const float* x) {
  PairSums sums;
  for (uint32_t at = 0; at < count; at += kTruthLanes) {
    for (uint32_t i = 0; i < kParts; ++i) {
      const Doubles numbers = LoadFloats(x + at + i * kWidth);
      sums.Add(i, hn::Mul(numbers, numbers), hn::Zero(DoubleTag()));
    }
  }
  LaneSums result;
  sums.Store(result.high.data(), result.low.data());
  return result;
}

void SumSidesTarget(uint32_t count, const double* in, const SplitNumbers& numbers, LaneSums* inside,
                    LaneSums* outside) {
  const DoubleTag d;
  PairSums sums[2];
  Doubles errors[2][kParts];
  for (auto& side : errors) {
    for (Doubles& one : side) one = hn::Zero(d);
  }
  for (uint32_t at = 0; at < count; at += kTruthLanes) {
    for (uint32_t i = 0; i < kParts; ++i) {
      const size_t from = at + i * kWidth;
      const auto is_in = hn::Gt(hn::LoadU(d, in + from), hn::Zero(d));
      const Doubles high = hn::LoadU(d, numbers.high + from);
      const Doubles low = hn::LoadU(d, numbers.low + from);
      const Doubles error = hn::LoadU(d, numbers.error + from);
      sums[0].Add(i, hn::IfThenElseZero(is_in, high), hn::IfThenElseZero(is_in, low));
      sums[1].Add(i, hn::IfThenZeroElse(is_in, high), hn::IfThenZeroElse(is_in, low));
      errors[0][i] = hn::Add(errors[0][i], hn::IfThenElseZero(is_in, error));
      errors[1][i] = hn::Add(errors[1][i], hn::IfThenZeroElse(is_in, error));
    }
  }
  LaneSums* const sides[2] = {inside, outside};
  for (uint32_t side = 0; side < 2; ++side) {
    sums[side].Store(sides[side]->high.data(), sides[side]->low.data());
    for (uint32_t i = 0; i < kParts; ++i) {
      hn::StoreU(errors[side][i], d, sides[side]->error.data() + i * kWidth);
    }
  }
}

// A line of memory at a time.
void WeightedRowsTarget(uint32_t dim, const float* v, absl::Span<const uint32_t> tokens,
                        const SplitNumbers& weights, double* high, double* low) {
  const DoubleTag d;
  for (uint32_t c = 0; c < dim; c += 2 * kTruthLanes) {
    PairSums sums[2];
    for (const uint32_t token : tokens) {
      const float* const row = v + size_t{token} * dim + c;
      const Doubles weight = hn::Set(d, weights.high[token]);
      const Doubles rest = hn::Set(d, weights.low[token]);
      for (uint32_t half = 0; half < 2; ++half) {
        for (uint32_t i = 0; i < kParts; ++i) {
          const Doubles values = LoadFloats(row + half * kTruthLanes + i * kWidth);
          sums[half].Add(i, hn::Mul(weight, values), hn::Mul(rest, values));
        }
      }
    }
    for (uint32_t half = 0; half < 2; ++half) {
      sums[half].Store(high + c + half * kTruthLanes, low + c + half * kTruthLanes);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice::adversary
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice::adversary {

HWY_EXPORT(ExactDotsTarget);
HWY_EXPORT(SquaresTarget);
HWY_EXPORT(SumSidesTarget);
HWY_EXPORT(WeightedRowsTarget);

void ExactDots(uint32_t dim, const float* q, const float* k, uint32_t group_count, double* high,
               double* low, double* size) {
  HWY_DYNAMIC_DISPATCH(ExactDotsTarget)(dim, q, k, group_count, high, low, size);
}

LaneSums SquaresOf(uint32_t count, const float* x) {
  return HWY_DYNAMIC_DISPATCH(SquaresTarget)(count, x);
}

void SumSides(uint32_t count, const double* in, const SplitNumbers& numbers, LaneSums* inside,
              LaneSums* outside) {
  HWY_DYNAMIC_DISPATCH(SumSidesTarget)(count, in, numbers, inside, outside);
}

void WeightedRows(uint32_t dim, const float* v, absl::Span<const uint32_t> tokens,
                  const SplitNumbers& weights, double* high, double* low) {
  HWY_DYNAMIC_DISPATCH(WeightedRowsTarget)(dim, v, tokens, weights, high, low);
}

}  // namespace kvservice::adversary
#endif  // HWY_ONCE
