#include "attention/cpu/weight_sums.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>
#include <vector>

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/weight_sums.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/page_sum-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 64 weights of 2^-126, and 2^10 times as much: see SumWeightsTarget.
constexpr double kUnderflowMax = 0x1p-110;

// Adds up pages in doubles, a vector of pages at a time, in units of a power of two that is at
// least that of every page with a sum.
class PageAdder {
 public:
  HWY_INLINE explicit PageAdder(int32_t reference)
      : reference_(reference), weight_(hn::Zero(d_)), lower_(weight_), estimate_(weight_) {}

  // sums: of up to kPages pages, padded with zeros; pages with a sum of zero may hold anything.
  HWY_INLINE void Add(const float* sums, const int32_t* references, const float* lower_shares,
                      const float* estimate_shares, size_t count) {
    for (size_t i = 0; i < count; i += hn::Lanes(d_)) {
      const auto sum = Load(sums + i);
      const auto scale = Scale(references + i);
      const auto scaled = hn::Mul(sum, scale);
      weight_ = hn::Add(weight_, scaled);
      if (lower_shares == nullptr) continue;
      // What is far below the rest is rounded down here and up above.
      const auto counts =
          hn::And(hn::Gt(sum, hn::Zero(d_)), hn::Gt(scale, hn::Set(d_, kScaleLeast)));
      const auto lower_share = Load(lower_shares + i);
      const auto lower =
          hn::Mul(hn::Sub(sum, hn::Set(d_, kUnderflowMax)), hn::Mul(scale, lower_share));
      lower_ = hn::Add(
          lower_, hn::IfThenElseZero(hn::And(counts, hn::Gt(lower_share, hn::Zero(d_))), lower));
      const auto share = Load(estimate_shares + i);
      estimate_ = hn::Add(
          estimate_,
          hn::IfThenElseZero(hn::And(counts, hn::Gt(share, hn::Zero(d_))), hn::Mul(scaled, share)));
    }
  }

  HWY_INLINE MaskSums Sums() const { return {Total(weight_), Total(lower_), Total(estimate_)}; }

 private:
  using DoubleTag = hn::Repartition<double, FloatTag>;
  using Doubles = hn::Vec<DoubleTag>;
  static constexpr double kScaleLeast = 0x1p-1000;

  HWY_INLINE Doubles Load(const float* from) const {
    return hn::PromoteTo(d_, hn::LoadU(hn::Rebind<float, DoubleTag>(), from));
  }
  // As ScaleOf.
  HWY_INLINE Doubles Scale(const int32_t* references) const {
    const hn::Rebind<int32_t, DoubleTag> d32;
    const hn::RebindToSigned<DoubleTag> d64;
    constexpr int kMantissaBits = 52;
    constexpr int32_t kBias = 1023;
    auto change = hn::Sub(hn::LoadU(d32, references), hn::Set(d32, reference_));
    change = hn::Max(hn::Min(change, hn::Set(d32, -kScaleMin)), hn::Set(d32, kScaleMin));
    const auto bits = hn::PromoteTo(d64, hn::Add(change, hn::Set(d32, kBias)));
    return hn::BitCast(d_, hn::ShiftLeft<kMantissaBits>(bits));
  }
  HWY_INLINE ScaledSum Total(Doubles lanes) const {
    return {hn::GetLane(hn::SumOfLanes(d_, lanes)), reference_};
  }

  const DoubleTag d_;
  const int32_t reference_;
  Doubles weight_;
  Doubles lower_;
  Doubles estimate_;
};

// The sum of every page's selected weights; `sums` is [mask.size()].
HWY_INLINE void SumPages(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask,
                         float* sums) {
  const float* page_sums = &weights.page_sum[weights.PageIndex(head, weights.block_begin)];
  const float* numbers = weights.Page(weights.numbers(), head, weights.block_begin);
  for (size_t i = 0; i < mask.size(); ++i) {
    // Only parts of pages are read, so the processor does not see them coming.
    if (const size_t ahead = i + kPagesAhead; ahead < mask.size()) {
      if (mask[ahead] != 0 && mask[ahead] != ~uint64_t{0}) {
        PrefetchPage(numbers + ahead * kBlockTokens);
      }
    }
    sums[i] = mask[i] == 0 ? 0.0F : SumPage(numbers + i * kBlockTokens, page_sums[i], mask[i]);
  }
}

MaskSums SumWeightsTarget(const ScanWeights& weights, uint32_t head,
                          absl::Span<const uint64_t> mask) {
  constexpr size_t kPages = 64;
  const size_t first_page = weights.PageIndex(head, weights.block_begin);
  const int32_t* references = &weights.reference[first_page];
  std::vector<float> all_sums(mask.size());
  SumPages(weights, head, mask, all_sums.data());
  // Only pages that weigh something: next to one of which nothing is seen, whose power of two may
  // be any number larger, all the others would vanish, and their sum is at least 2^-126.
  int32_t reference = kReferenceMin;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (all_sums[i] != 0.0F) reference = HWY_MAX(reference, references[i]);
  }
  PageAdder adder(reference);
  // The arrays end with the last block of the last head; a vector may not read beyond.
  HWY_ALIGN std::array<float, kPages> last_sums{};
  HWY_ALIGN std::array<int32_t, kPages> last_references{};
  HWY_ALIGN std::array<float, kPages> last_lower{};
  HWY_ALIGN std::array<float, kPages> last_estimate{};
  for (size_t begin = 0; begin < mask.size(); begin += kPages) {
    const size_t count = HWY_MIN(kPages, mask.size() - begin);
    const float* sums = &all_sums[begin];
    const int32_t* from = references + begin;
    const float* lower = weights.bounded ? &weights.lower_share[first_page + begin] : nullptr;
    const float* estimate = weights.bounded ? &weights.estimate_share[first_page + begin] : nullptr;
    if (count < kPages) {
      std::copy_n(sums, count, last_sums.begin());
      sums = last_sums.data();
      std::copy_n(from, count, last_references.begin());
      from = last_references.data();
      if (weights.bounded) {
        std::copy_n(lower, count, last_lower.begin());
        std::copy_n(estimate, count, last_estimate.begin());
        lower = last_lower.data();
        estimate = last_estimate.data();
      }
    }
    adder.Add(sums, from, lower, estimate, count);
  }
  return adder.Sums();
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(SumWeightsTarget);

void ScaledSum::Add(double mass, int32_t exponent, bool upward) {
  if (mass == 0.0) return;
  if (exponent > reference) {
    const int32_t change = reference - exponent;
    sum *= change < kScaleMin && !upward ? 0.0 : ScaleOf(change);
    reference = exponent;
  }
  const int32_t change = exponent - reference;
  sum += change < kScaleMin && !upward ? 0.0 : mass * ScaleOf(change);
}

double ScaledSum::Log() const { return sum == 0.0 ? kLogZero : std::log(sum) + reference * kLn2; }

MaskSums SumMask(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask) {
  return HWY_DYNAMIC_DISPATCH(SumWeightsTarget)(weights, head, mask);
}

ScaledSum SumEstimates(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask) {
  const MaskSums sums = SumMask(weights, head, mask);
  return weights.bounded ? sums.estimate : sums.weight;
}

WeightSums SumWeights(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask) {
  assert(weights.bounded);
  return WeightSumsOf(SumMask(weights, head, mask));
}

WeightSums WeightSumsOf(const MaskSums& sums) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double upper = sums.weight.Log();
  const double lower = sums.lower.sum > 0.0 ? sums.lower.Log() : kLogZero;
  // Infinity, and NaN too, in the weights: nothing is known.
  return {.upper = {upper < kInfinity ? WidenUp(upper + kMassError) : kInfinity},
          .lower = {lower < kInfinity ? WidenDown(lower - kMassError) : kLogZero},
          .log_estimate = sums.estimate.Log()};
}

}  // namespace kvservice
#endif  // HWY_ONCE
