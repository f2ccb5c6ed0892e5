#include "attention/cpu/choose.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/choose.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#ifndef KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE
#define KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE
namespace kvservice {
namespace {

// What the weights of a page are multiplied with before they are added up.
enum class Share : uint8_t { kNumbers, kLower, kEstimate };

}  // namespace
}  // namespace kvservice
#endif  // KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 64 weights of 2^-126, and 2^10 times as much: see SumWeightsTarget.
constexpr double kUnderflowMax = 0x1p-110;

using FloatTag = hn::CappedTag<float, 16>;
using ScoreTag = hn::CappedTag<int16_t, 32>;

// The lanes of a vector that a word's bits select, from bit `token` on. Reads eight bytes of
// `bits`.
template <class D>
HWY_INLINE hn::Mask<D> MaskOf(D d, uint64_t word, size_t token) {
  const uint64_t bits = word >> token;
  return hn::LoadMaskBits(d, reinterpret_cast<const uint8_t*>(&bits));
}

// Sums of the selected numbers of a page, one per lane.
HWY_INLINE hn::Vec<FloatTag> SumLanes(const float* HWY_RESTRICT numbers, uint64_t word) {
  const FloatTag d;
  auto sum = hn::Zero(d);
  if (word == ~uint64_t{0}) {
    for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
      sum = hn::Add(sum, hn::LoadU(d, numbers + t));
    }
    return sum;
  }
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    sum = hn::Add(sum, hn::IfThenElseZero(MaskOf(d, word, t), hn::LoadU(d, numbers + t)));
  }
  return sum;
}

// Adds up pages in lanes of doubles: only up to 16 additions per page round to fp32.
class PageAdder {
 public:
  HWY_INLINE PageAdder() : low_(hn::Zero(d64_)), high_(hn::Zero(d64_)) {}
  HWY_INLINE void Add(hn::Vec<FloatTag> page, double scale) {
    const hn::Half<FloatTag> half;
    const auto factor = hn::Set(d64_, scale);
    low_ = hn::MulAdd(hn::PromoteTo(d64_, hn::LowerHalf(half, page)), factor, low_);
    high_ = hn::MulAdd(hn::PromoteTo(d64_, hn::UpperHalf(half, page)), factor, high_);
  }
  HWY_INLINE double Sum() const { return hn::GetLane(hn::SumOfLanes(d64_, hn::Add(low_, high_))); }

 private:
  using DoubleTag = hn::Repartition<double, FloatTag>;
  const DoubleTag d64_;
  hn::Vec<DoubleTag> low_;
  hn::Vec<DoubleTag> high_;
};

ScaledSum SumWeightsTarget(const ScanWeights& weights, Share share, uint32_t head,
                           absl::Span<const uint64_t> mask) {
  const size_t first_page = weights.PageIndex(head, weights.block_begin);
  const int32_t* references = &weights.reference[first_page];
  const float* page_sums = &weights.page_sum[first_page];
  const float* shares = share == Share::kLower      ? &weights.lower_share[first_page]
                        : share == Share::kEstimate ? &weights.estimate_share[first_page]
                                                    : nullptr;
  // Upper ends are rounded up where they vanish next to the sum, all else down.
  const bool upward = weights.bounded && share == Share::kNumbers;
  const float* numbers = weights.Page(weights.numbers(), head, weights.block_begin);
  ScaledSum sum;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != 0) sum.reference = HWY_MAX(sum.reference, references[i]);
  }
  PageAdder adder;
  double whole_pages = 0.0;
  for (uint32_t i = 0; i < mask.size(); ++i) {
    if (mask[i] == 0) continue;
    const int32_t change = references[i] - sum.reference;
    if (change < kScaleMin && !upward) continue;
    double scale = ScaleOf(change);
    if (shares != nullptr) {
      if (shares[i] == 0.0F) continue;
      scale *= static_cast<double>(shares[i]);
    }
    if (mask[i] == ~uint64_t{0}) {
      whole_pages += static_cast<double>(page_sums[i]) * scale;
    } else {
      adder.Add(SumLanes(numbers + size_t{i} * kBlockTokens, mask[i]), scale);
    }
    // Weights that stand for an exponential which underflowed are no lower ends: what they and the
    // rounding of what is left may come to.
    if (share == Share::kLower) whole_pages -= kUnderflowMax * scale;
  }
  sum.sum = adder.Sum() + whole_pages;
  // NaN stays: it says that nothing is known.
  if (sum.sum < 0.0) sum.sum = 0.0;
  return sum;
}

// Cuts shares to scores: the upper half of a float's bits, which rise with it; -1 for tokens that
// are no candidates.
template <class V>
HWY_INLINE void StoreScores(V share, hn::Mask<FloatTag> candidates, int16_t* to) {
  const hn::RebindToSigned<FloatTag> di;
  const hn::Rebind<int16_t, FloatTag> d16;
  // Without the sign, which NaN may carry.
  const auto bits = hn::And(hn::ShiftRight<16>(hn::BitCast(di, share)), hn::Set(di, 0x7fff));
  const auto score = hn::IfThenElse(hn::RebindMask(di, candidates), bits, hn::Set(di, -1));
  hn::StoreU(hn::DemoteTo(d16, score), d16, to);
}

// Scores of a block from its weights. With kByMass also stores every head's shares, [head][blocks *
// 64].
template <bool kByMass, bool kLargest>
HWY_INLINE void ScoreBlock(const ChooseTask& task, uint32_t index, ChooseScratch* scratch) {
  const FloatTag d;
  const ScanWeights& weights = *task.weights;
  const std::vector<float>& numbers = weights.numbers();
  const size_t blocks = task.candidates.size();
  const size_t stride = blocks * kBlockTokens;
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    auto score = hn::Zero(d);
    for (uint32_t head = 0; head < weights.head_count; ++head) {
      const float* page = weights.Page(numbers, head, weights.block_begin + index);
      const auto share =
          hn::Mul(hn::LoadU(d, page + t), hn::Set(d, scratch->factors[head * blocks + index]));
      score = kLargest ? hn::Max(score, share) : hn::Add(score, share);
      if constexpr (kByMass) {
        hn::StoreU(share, d, &scratch->shares[head * stride + index * kBlockTokens + t]);
      }
    }
    StoreScores(score, MaskOf(d, task.candidates[index], t),
                &scratch->scores[size_t{index} * kBlockTokens + t]);
  }
}

void ScoreTarget(const ChooseTask& task, bool by_mass, ChooseScratch* scratch) {
  for (uint32_t index = 0; index < task.candidates.size(); ++index) {
    if (task.candidates[index] == 0) {
      std::fill_n(&scratch->scores[size_t{index} * kBlockTokens], kBlockTokens, int16_t{-1});
    } else if (by_mass) {
      ScoreBlock<true, true>(task, index, scratch);
    } else if (task.proving) {
      ScoreBlock<false, true>(task, index, scratch);
    } else {
      ScoreBlock<false, false>(task, index, scratch);
    }
  }
}

// How many scores are at least `threshold` (>= 0).
size_t CountTarget(absl::Span<const int16_t> scores, int16_t threshold) {
  const ScoreTag d;
  const auto below = hn::Set(d, static_cast<int16_t>(threshold - 1));
  size_t count = 0;
  for (size_t i = 0; i < scores.size(); i += hn::Lanes(d)) {
    count += hn::CountTrue(d, hn::Gt(hn::LoadU(d, &scores[i]), below));
  }
  return count;
}

// The tokens of a block whose scores are at least `threshold` (>= 0).
uint64_t SelectWord(const int16_t* scores, int16_t threshold) {
  const ScoreTag d;
  const auto below = hn::Set(d, static_cast<int16_t>(threshold - 1));
  uint64_t word = 0;
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    uint64_t bits = 0;
    hn::StoreMaskBits(d, hn::Gt(hn::LoadU(d, scores + t), below),
                      reinterpret_cast<uint8_t*>(&bits));
    word |= bits << t;
  }
  return word;
}

void SelectTarget(absl::Span<const int16_t> scores, int16_t threshold, TokenMask* mask) {
  for (size_t i = 0; i < mask->size(); ++i) {
    (*mask)[i] = SelectWord(&scores[i * kBlockTokens], threshold);
  }
}

// Sum of the shares of candidates whose scores are below `threshold`.
double SumBelowTarget(absl::Span<const int16_t> scores, const float* HWY_RESTRICT shares,
                      absl::Span<const uint64_t> candidates, int16_t threshold) {
  PageAdder adder;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const uint64_t below = candidates[i] & ~SelectWord(&scores[i * kBlockTokens], threshold);
    if (below != 0) adder.Add(SumLanes(shares + i * kBlockTokens, below), 1.0);
  }
  return adder.Sum();
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {
namespace {

HWY_EXPORT(SumWeightsTarget);
HWY_EXPORT(ScoreTarget);
HWY_EXPORT(CountTarget);
HWY_EXPORT(SelectTarget);
HWY_EXPORT(SumBelowTarget);

ScaledSum SumWeights(const ScanWeights& weights, Share share, uint32_t head,
                     absl::Span<const uint64_t> mask) {
  return HWY_DYNAMIC_DISPATCH(SumWeightsTarget)(weights, share, head, mask);
}

constexpr double kLog2E64 = 0x1.71547652b82fep+0;
// The highest threshold asked for; infinity scores 0x7f80.
constexpr int32_t kThresholdMax = 0x7ffe;
// A plan by mass leaves this much of its limit to the difference between estimated and measured
// normalisers (certificate section 3, step 2).
constexpr double kPlannedShare = 0.93;

// Masses of all heads that a choice is measured against.
class Normalizers {
 public:
  explicit Normalizers(const ChooseTask& task) {
    const ScanWeights& weights = *task.weights;
    for (uint32_t head = 0; head < weights.head_count; ++head) {
      ScaledSum sum = SumEstimates(weights, head, task.pool);
      const double always = task.always_lse[head];
      if (std::isfinite(always)) {
        const auto exponent = static_cast<int32_t>(
            std::clamp(always * kLog2E64, static_cast<double>(kReferenceMin), 3e6));
        sum.Add(std::exp(always - exponent * kLn2), exponent, /*upward=*/false);
      }
      sums_.push_back(sum);
    }
  }

  // What a head's weights with the given power of two must be multiplied with to be shares.
  double Factor(uint32_t head, int32_t exponent) const {
    const ScaledSum& sum = sums_[head];
    if (sum.sum == 0.0) return ScaleOf(exponent - sum.reference);
    return ScaleOf(exponent - sum.reference) / sum.sum;
  }

 private:
  std::vector<ScaledSum> sums_;
};

// Shares of what is dropped in any case, per head; empty where masses do not count.
std::vector<double> UnreadShares(const ChooseTask& task, const Normalizers& normalizers) {
  std::vector<double> shares;
  if (!(task.mass_limit > 0.0F)) return shares;
  const ScanWeights& weights = *task.weights;
  for (uint32_t head = 0; head < weights.head_count; ++head) {
    shares.push_back(0.0);
    if (!task.proving) continue;
    const ScaledSum sum = SumWeights(weights, Share::kNumbers, head, task.unread);
    shares.back() = sum.sum * normalizers.Factor(head, sum.reference);
  }
  return shares;
}

// The two rules of a plan, as questions about thresholds: is it enough to keep all candidates with
// a score of at least this much?
class KeepRules {
 public:
  // `unread` as from UnreadShares; empty leaves only top_k.
  KeepRules(const ChooseTask& task, uint32_t top_k, std::vector<double> unread,
            const ChooseScratch& scratch)
      : task_(task),
        scratch_(scratch),
        top_k_(top_k),
        limit_(kPlannedShare * static_cast<double>(task.mass_limit)),
        unread_(std::move(unread)) {}

  bool Hold(int32_t threshold) const {
    const auto least = static_cast<int16_t>(threshold);
    if (CountAtLeast(least) < top_k_) return false;
    for (uint32_t head = 0; head < unread_.size(); ++head) {
      if (!(Rest(head, least) <= limit_)) return false;
    }
    return true;
  }

  size_t CountAtLeast(int16_t threshold) const {
    return HWY_DYNAMIC_DISPATCH(CountTarget)(scores(), threshold);
  }

  // A head's share of what has a lower score.
  double Rest(uint32_t head, int16_t threshold) const {
    const float* shares = &scratch_.shares[head * scores().size()];
    return unread_[head] +
           HWY_DYNAMIC_DISPATCH(SumBelowTarget)(scores(), shares, task_.candidates, threshold);
  }

  // Adds candidates that score exactly `threshold`, by position, until the rules hold.
  void Fill(int32_t threshold, TokenMask* kept) const {
    size_t count = CountTokens(*kept);
    std::vector<double> rests;
    for (uint32_t head = 0; head < unread_.size(); ++head) {
      rests.push_back(Rest(head, static_cast<int16_t>(threshold + 1)));
    }
    const auto enough = [&] {
      return count >= top_k_ && std::all_of(rests.begin(), rests.end(),
                                            [this](double rest) { return rest <= limit_; });
    };
    for (size_t i = 0; i < scores().size(); ++i) {
      if (scores()[i] != threshold) continue;
      if (enough()) return;
      (*kept)[i / kBlockTokens] |= uint64_t{1} << (i % kBlockTokens);
      ++count;
      for (uint32_t head = 0; head < rests.size(); ++head) {
        rests[head] -= static_cast<double>(scratch_.shares[head * scores().size() + i]);
      }
    }
  }

 private:
  absl::Span<const int16_t> scores() const {
    return absl::MakeConstSpan(scratch_.scores.data(), task_.candidates.size() * kBlockTokens);
  }

  const ChooseTask& task_;
  const ChooseScratch& scratch_;
  const uint32_t top_k_;
  const double limit_;
  const std::vector<double> unread_;
};

// The highest threshold at which a falling predicate holds, given that it holds at 0.
template <class Predicate>
int32_t HighestThreshold(const Predicate& holds) {
  int32_t low = 0;
  int32_t high = kThresholdMax + 1;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

// Candidates scoring above the threshold.
TokenMask SelectAbove(int32_t threshold, size_t blocks, const ChooseScratch& scratch) {
  TokenMask mask(blocks, 0);
  HWY_DYNAMIC_DISPATCH(SelectTarget)
  (absl::MakeConstSpan(scratch.scores.data(), blocks * kBlockTokens),
   static_cast<int16_t>(threshold + 1), &mask);
  return mask;
}

// The candidates that the rules ask for, strongest first.
TokenMask Apply(const KeepRules& rules, size_t blocks, const ChooseScratch& scratch) {
  // Every candidate scores at least 0; where even all of them are not enough, all are kept.
  const int32_t threshold = HighestThreshold([&](int32_t t) { return rules.Hold(t); });
  TokenMask kept = SelectAbove(threshold, blocks, scratch);
  rules.Fill(threshold, &kept);
  return kept;
}

void Reserve(const ChooseTask& task, bool by_mass, ChooseScratch* scratch) {
  const size_t pages = task.weights->head_count * task.candidates.size();
  const auto grow = [](size_t size, auto* numbers) {
    if (numbers->size() < size) numbers->resize(size);
  };
  grow(task.candidates.size() * kBlockTokens, &scratch->scores);
  grow(pages, &scratch->factors);
  if (by_mass) grow(pages * kBlockTokens, &scratch->shares);
}

}  // namespace

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

ScaledSum SumEstimates(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask) {
  return SumWeights(weights, weights.bounded ? Share::kEstimate : Share::kNumbers, head, mask);
}

LogMassUpper SumUpperWeights(const ScanWeights& weights, uint32_t head,
                             absl::Span<const uint64_t> mask) {
  const double log = SumWeights(weights, Share::kNumbers, head, mask).Log();
  // Infinity, and NaN too, in the weights: nothing is known.
  if (!(log < std::numeric_limits<double>::infinity())) {
    return {std::numeric_limits<double>::infinity()};
  }
  return {WidenUp(log + kMassError)};
}

LogMassLower SumLowerWeights(const ScanWeights& weights, uint32_t head,
                             absl::Span<const uint64_t> mask) {
  const double log = SumWeights(weights, Share::kLower, head, mask).Log();
  if (!(log < std::numeric_limits<double>::infinity())) return {kLogZero};
  return {WidenDown(log - kMassError)};
}

TokenMask Choose(const ChooseTask& task, ChooseScratch* scratch) {
  const size_t blocks = task.candidates.size();
  const bool by_mass = task.mass_limit > 0.0F;
  const uint32_t candidate_count = CountTokens(task.candidates);
  if (candidate_count == 0 || (task.top_k == 0 && !by_mass)) return TokenMask(blocks, 0);
  assert(!task.proving || task.weights->bounded);
  Reserve(task, by_mass, scratch);
  const Normalizers normalizers(task);
  const ScanWeights& weights = *task.weights;
  for (uint32_t head = 0; head < weights.head_count; ++head) {
    for (uint32_t i = 0; i < blocks; ++i) {
      if (task.candidates[i] == 0) continue;
      const size_t page = weights.PageIndex(head, weights.block_begin + i);
      const int32_t reference = weights.reference[page];
      double factor = normalizers.Factor(head, reference);
      if (weights.bounded && !task.proving) factor *= weights.estimate_share[page];
      scratch->factors[head * blocks + i] = static_cast<float>(factor);
    }
  }
  HWY_DYNAMIC_DISPATCH(ScoreTarget)(task, by_mass, scratch);
  TokenMask kept = Apply(KeepRules(task, std::min(task.top_k, candidate_count),
                                   UnreadShares(task, normalizers), *scratch),
                         blocks, *scratch);
  if (task.dilate_strongest == 0 || task.dilate_radius == 0) return kept;
  const uint32_t strongest = std::min(task.dilate_strongest, CountTokens(kept));
  TokenMask neighbours = Apply(KeepRules(task, strongest, {}, *scratch), blocks, *scratch);
  Dilate(task.dilate_radius, &neighbours);
  for (size_t i = 0; i < blocks; ++i) kept[i] |= neighbours[i] & task.candidates[i];
  return kept;
}

}  // namespace kvservice
#endif  // HWY_ONCE
