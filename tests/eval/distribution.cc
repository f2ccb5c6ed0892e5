#include "tests/eval/distribution.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/eval/distribution.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// As many floats as a vector has doubles, so that terms are widened where they are added.
using Doubles = hn::ScalableTag<double>;
using Floats = hn::Rebind<float, Doubles>;
constexpr size_t kLanes = hn::MaxLanes(Doubles());

// e^x, 0 below 2^-126.
HWY_INLINE hn::Vec<Floats> PlainExp(hn::Vec<Floats> x) {
  const Floats d;
  return ExpScaled(d, x, hn::Zero(hn::RebindToSigned<Floats>()));
}

// Sum of term(i) over whole vectors, then of last_term(i) over the numbers that are left.
template <class Term, class LastTerm>
HWY_INLINE double SumTerms(size_t count, const Term& term, const LastTerm& last_term) {
  const Doubles dd;
  auto sums = hn::Zero(dd);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums = hn::Add(sums, hn::PromoteTo(dd, term(i)));
  double sum = hn::GetLane(hn::SumOfLanes(dd, sums));
  for (; i < count; ++i) sum += double{last_term(i)};
  return sum;
}

float LargestTarget(const float* numbers, size_t count) {
  const hn::ScalableTag<float> d;
  constexpr size_t kFloats = hn::MaxLanes(hn::ScalableTag<float>());
  auto largest = hn::Set(d, numbers[0]);
  size_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    largest = hn::Max(largest, hn::LoadU(d, numbers + i));
  }
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; i < count; ++i) result = std::max(result, numbers[i]);
  return result;
}

double SumOfExpTarget(const float* logits, size_t count, float peak) {
  const Floats d;
  const auto subtracted = hn::Set(d, peak);
  return SumTerms(
      count,
      [&](size_t i) HWY_ATTR { return PlainExp(hn::Sub(hn::LoadU(d, logits + i), subtracted)); },
      [&](size_t i) HWY_ATTR { return hn::GetLane(PlainExp(hn::Set(d, logits[i] - peak))); });
}

void NormaliseTarget(const float* logits, size_t count, float log_sum, float* out) {
  const Floats d;
  const auto subtracted = hn::Set(d, log_sum);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto log_share = hn::Sub(hn::LoadU(d, logits + i), subtracted);
    hn::StoreU(PlainExp(hn::Min(log_share, hn::Zero(d))), d, out + i);
  }
  for (; i < count; ++i) {
    out[i] = hn::GetLane(PlainExp(hn::Set(d, std::min(0.0F, logits[i] - log_sum))));
  }
}

double DivergenceTarget(const float* p, const float* p_logits, const float* q_logits, size_t count,
                        float offset) {
  const Floats d;
  const auto subtracted = hn::Set(d, offset);
  return SumTerms(
      count,
      [&](size_t i) HWY_ATTR {
        const auto difference = hn::Sub(hn::LoadU(d, p_logits + i), hn::LoadU(d, q_logits + i));
        return hn::Mul(hn::LoadU(d, p + i), hn::Sub(difference, subtracted));
      },
      [&](size_t i) HWY_ATTR { return p[i] * (p_logits[i] - q_logits[i] - offset); });
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(LargestTarget);
HWY_EXPORT(SumOfExpTarget);
HWY_EXPORT(NormaliseTarget);
HWY_EXPORT(DivergenceTarget);

namespace eval {

LogSum LogSumOf(absl::Span<const float> logits) {
  assert(!logits.empty());
  const float peak = HWY_DYNAMIC_DISPATCH(LargestTarget)(logits.data(), logits.size());
  const double total = HWY_DYNAMIC_DISPATCH(SumOfExpTarget)(logits.data(), logits.size(), peak);
  const auto* const best = std::find(logits.begin(), logits.end(), peak);
  return {.value = double{peak} + std::log(total),
          .best = static_cast<uint32_t>(best - logits.begin())};
}

void Normalise(absl::Span<const float> logits, double log_sum, float* out) {
  HWY_DYNAMIC_DISPATCH(NormaliseTarget)
  (logits.data(), logits.size(), static_cast<float>(log_sum), out);
}

double Divergence(absl::Span<const float> p, absl::Span<const float> p_logits, double p_log_sum,
                  absl::Span<const float> q_logits, double q_log_sum) {
  assert(p.size() == p_logits.size() && p.size() == q_logits.size());
  return HWY_DYNAMIC_DISPATCH(DivergenceTarget)(p.data(), p_logits.data(), q_logits.data(),
                                                p.size(),
                                                static_cast<float>(p_log_sum - q_log_sum));
}

}  // namespace eval
}  // namespace kvservice
#endif  // HWY_ONCE
