#include "attention/cpu/choose.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <limits>

#include "attention/cpu/exp.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/choose.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/page_sum-inl.h"

#ifndef KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE
#define KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE
namespace kvservice {
namespace {

// Quarters of octaves of all floats that are not negative.
constexpr int32_t kQuarterBits = 21;
constexpr size_t kQuarters = 1024;
// A guess at a threshold looks at this many groups of 16 tokens, or at all if there are not twice
// as many.
constexpr uint32_t kGuessTokens = 16;
constexpr uint32_t kGuessGroups = 64;

// A page's power of two is the nearest to its largest weight: that is at most 2^0.5, but for
// rounding.
constexpr float kPageWeightMax = 1.5F;

}  // namespace
}  // namespace kvservice
#endif  // KVSERVICE_ATTENTION_CPU_CHOOSE_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Where a block's weights lie, per head that counts.
struct BlockPages {
  HWY_INLINE explicit BlockPages(const SplitTask& task) : heads(task.heads.size()) {
    const ScanWeights& weights = *task.weights;
    for (size_t h = 0; h < heads; ++h) {
      first[h] = weights.Page(weights.numbers(), task.heads[h], weights.block_begin);
      sums[h] = &weights.page_sum[weights.PageIndex(task.heads[h], weights.block_begin)];
    }
  }

  const size_t heads;
  std::array<const float*, HeadSet().size()> first;  // of the first block
  std::array<const float*, HeadSet().size()> sums;
};

// Scores of a vector of tokens, from token `token` of the first block on.
template <bool kLargest>
HWY_INLINE hn::Vec<FloatTag> Scores(const BlockPages& pages, const float* factors, size_t token) {
  const FloatTag d;
  const auto unknown = hn::Set(d, std::numeric_limits<float>::infinity());
  auto score = hn::Zero(d);
  for (size_t h = 0; h < pages.heads; ++h) {
    auto share = hn::Mul(hn::LoadU(d, pages.first[h] + token), hn::Set(d, factors[h]));
    // NaN is more than any number: nothing is known.
    share = hn::IfThenElse(hn::Ge(share, hn::Zero(d)), share, unknown);
    score = kLargest ? hn::Max(score, share) : hn::Add(score, share);
  }
  // Without the sign that the NaN of an infinite weight may carry: scores are taken for integers.
  return hn::Abs(score);
}

// Scores of a block's tokens; returns those that are at least `threshold`.
template <bool kLargest>
HWY_INLINE uint64_t ScoreBlock(const BlockPages& pages, const float* factors, size_t block,
                               float threshold, float* HWY_RESTRICT scores) {
  const FloatTag d;
  const auto least = hn::Set(d, threshold);
  uint64_t above = 0;
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    const auto score = Scores<kLargest>(pages, factors, block * kBlockTokens + t);
    hn::Store(score, d, scores + t);
    uint64_t bits = 0;
    hn::StoreMaskBits(d, hn::Ge(score, least), reinterpret_cast<uint8_t*>(&bits));
    above |= bits << t;
  }
  return above;
}

// Adds to rests[place] the shares of candidates that score below `threshold`, and makes entries of
// the others. Without `rests` masses do not count.
void SplitTarget(const SplitTask& task, float threshold, absl::Span<double> rests,
                 std::vector<ChooseScratch::Entry>* entries) {
  const BlockPages pages(task);
  HWY_ALIGN std::array<float, kBlockTokens> scores;
  const auto reaches = [&](size_t block) HWY_ATTR {
    const float* factors = task.factors + block * pages.heads;
    float reach = 0.0F;
    for (size_t h = 0; h < pages.heads; ++h) {
      reach = task.largest ? HWY_MAX(reach, factors[h]) : reach + factors[h];
    }
    return !(reach * kPageWeightMax < threshold);
  };
  for (uint32_t i = 0; i < task.candidates.size(); ++i) {
    if (const size_t ahead = i + kPagesAhead; ahead < task.candidates.size()) {
      if (task.candidates[ahead] != 0 && reaches(ahead)) {
        for (size_t h = 0; h < pages.heads; ++h)
          PrefetchPage(pages.first[h] + ahead * kBlockTokens);
      }
    }
    const uint64_t word = task.candidates[i];
    if (word == 0) continue;
    const float* factors = task.factors + i * pages.heads;
    uint64_t above = 0;
    if (reaches(i)) {
      above =
          word & (task.largest ? ScoreBlock<true>(pages, factors, i, threshold, scores.data())
                               : ScoreBlock<false>(pages, factors, i, threshold, scores.data()));
    }
    for (uint64_t bits = above; bits != 0; bits &= bits - 1) {
      const auto token = static_cast<uint32_t>(std::countr_zero(bits));
      entries->push_back({i * kBlockTokens + token, scores[token]});
    }
    const uint64_t below = word & ~above;
    if (below == 0) continue;
    for (size_t h = 0; h < rests.size(); ++h) {
      const float sum = SumPage(pages.first[h] + size_t{i} * kBlockTokens, pages.sums[h][i], below);
      rests[h] += static_cast<double>(sum) * static_cast<double>(factors[h]);
    }
  }
}

// Histogram of the scores of a part of the candidates, every `stride`-th group of 16 tokens, and
// with `sums` of every head's shares: sums[place * kQuarters + quarter]. Returns how many there
// are.
uint32_t SampleTarget(const SplitTask& task, uint32_t stride, absl::Span<float> sums,
                      absl::Span<uint32_t> counts) {
  const FloatTag d;
  const BlockPages pages(task);
  HWY_ALIGN std::array<float, kGuessTokens> scores;
  constexpr uint32_t kParts = kBlockTokens / kGuessTokens;
  const auto groups = static_cast<uint32_t>(task.candidates.size() * kParts);
  uint32_t seen = 0;
  for (uint32_t group = 0; group < groups; group += stride) {
    if (const size_t ahead = size_t{group} + size_t{stride} * kGroupsAhead; ahead < groups) {
      for (size_t h = 0; h < pages.heads; ++h) {
        hwy::Prefetch(pages.first[h] + ahead * kGuessTokens);
      }
    }
    const uint64_t word = task.candidates[group / kParts] >> (group % kParts * kGuessTokens);
    constexpr uint64_t kGroup = (uint64_t{1} << kGuessTokens) - 1;
    if ((word & kGroup) == 0) continue;
    const float* factors = task.factors + group / kParts * pages.heads;
    const size_t first = size_t{group} * kGuessTokens;
    for (size_t t = 0; t < kGuessTokens; t += hn::Lanes(d)) {
      const auto score = task.largest ? Scores<true>(pages, factors, first + t)
                                      : Scores<false>(pages, factors, first + t);
      hn::Store(score, d, scores.data() + t);
    }
    for (uint64_t bits = word & kGroup; bits != 0; bits &= bits - 1) {
      const auto token = static_cast<size_t>(std::countr_zero(bits));
      const auto quarter =
          static_cast<size_t>(std::bit_cast<int32_t>(scores[token]) >> kQuarterBits);
      ++counts[quarter];
      ++seen;
      for (size_t h = 0; h * kQuarters < sums.size(); ++h) {
        sums[h * kQuarters + quarter] += pages.first[h][first + token] * factors[h];
      }
    }
  }
  return seen;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {
namespace {

HWY_EXPORT(SplitTarget);
HWY_EXPORT(SampleTarget);

constexpr double kLog2E64 = 0x1.71547652b82fep+0;

// Scores by the upper 16 bits of a float, which rise with it: 128 steps per octave.
constexpr int32_t kStepBits = 16;
// Steps of a histogram, from the least score in it; what lies above is in the last one.
constexpr int32_t kStepsMax = 4096;
// What a guess leaves to the difference between a sample and the whole.
constexpr double kGuessedShare = 0.75;
constexpr double kGuessedCount = 1.5;
constexpr uint32_t kGuessesMax = 4;

int32_t StepOf(float score) { return std::bit_cast<int32_t>(score) >> kStepBits; }

// What a head's weights with the given power of two must be multiplied with to be shares.
double FactorOf(const ScaledSum& normalizer, int32_t exponent) {
  const double scale = ScaleOf(exponent - normalizer.reference);
  return normalizer.sum == 0.0 ? scale : scale / normalizer.sum;
}

ScaledSum NormalizerOf(const ChooseTask& task, uint32_t head) {
  ScaledSum sum = SumEstimates(*task.weights, head, task.pool);
  const double always = task.always_lse[head];
  if (std::isfinite(always)) {
    const auto exponent = static_cast<int32_t>(
        std::clamp(always * kLog2E64, static_cast<double>(kReferenceMin), 3e6));
    sum.Add(std::exp(always - exponent * kLn2), exponent, /*upward=*/false);
  }
  return sum;
}

}  // namespace

Chooser::Chooser(const ChooseTask& task, ChooseScratch* scratch)
    : task_(task),
      scratch_(scratch),
      blocks_(task.candidates.size()),
      by_mass_(task.mass_limit > 0.0F),
      largest_(by_mass_ || task.proving),
      limit_(task.planned_share * static_cast<double>(task.mass_limit)),
      candidate_count_(CountTokens(task.candidates)),
      top_k_(std::min(task.top_k, candidate_count_)) {
  assert(!task.proving || task.weights->bounded);
  for (uint32_t head = 0; head < task.weights->head_count; ++head) {
    if (task.excused[head]) continue;
    heads_.push_back(head);
    normalizers_.push_back(NormalizerOf(task, head));
  }
}

// Sets factors and what no choice changes, for one sample factor.
void Chooser::SetFactors(double sample_factor) {
  const ScanWeights& weights = *task_.weights;
  scratch_->factors.resize(blocks_ * heads_.size());
  for (size_t place = 0; place < heads_.size(); ++place) {
    const size_t first_page = weights.PageIndex(heads_[place], weights.block_begin);
    const ScaledSum& normalizer = normalizers_[place];
    const double inverse = normalizer.sum == 0.0 ? 1.0 : 1.0 / normalizer.sum;
    for (size_t i = 0; i < blocks_; ++i) {
      if (task_.candidates[i] == 0) continue;
      const size_t page = first_page + i;
      double factor = ScaleOf(weights.reference[page] - normalizer.reference) * inverse;
      if (weights.bounded) {
        const auto estimate = static_cast<double>(weights.estimate_share[page]);
        factor *= task_.proving ? estimate + sample_factor * (1.0 - estimate) : estimate;
      }
      // Unknown weights are infinite, but for those that a head does not see.
      const bool known = weights.page_sum[page] <= std::numeric_limits<float>::max();
      scratch_->factors[i * heads_.size() + place] =
          known ? static_cast<float>(factor) : std::numeric_limits<float>::max();
    }
  }
  unread_.assign(by_mass_ ? heads_.size() : 0, 0.0);
  if (!by_mass_ || !task_.proving || CountTokens(task_.unread) == 0) return;
  for (size_t place = 0; place < heads_.size(); ++place) {
    const MaskSums sums = SumMask(weights, heads_[place], task_.unread);
    const double sum = sums.estimate.sum + sample_factor * (sums.weight.sum - sums.estimate.sum);
    unread_[place] = sum * FactorOf(normalizers_[place], sums.weight.reference);
  }
}

SplitTask Chooser::Split() const {
  SplitTask split;
  split.weights = task_.weights;
  split.heads = heads_;
  split.candidates = task_.candidates;
  split.factors = scratch_->factors.data();
  split.largest = largest_;
  return split;
}

float Chooser::ShareOf(size_t place, uint32_t index) const {
  const ScanWeights& weights = *task_.weights;
  const float* page =
      weights.Page(weights.numbers(), heads_[place], weights.block_begin + index / kBlockTokens);
  const float share =
      page[index % kBlockTokens] * scratch_->factors[index / kBlockTokens * heads_.size() + place];
  return share >= 0.0F ? share : std::numeric_limits<float>::infinity();
}

// About the highest threshold at which the entries suffice, from a sample of the candidates; 0 if
// none does.
float Chooser::GuessThreshold() const {
  std::vector<float>& sums = scratch_->sample;
  std::vector<uint32_t>& counts = scratch_->counts;
  const size_t heads = by_mass_ ? heads_.size() : 0;
  sums.assign(kQuarters * heads, 0.0F);
  counts.assign(kQuarters, 0);
  const auto groups = static_cast<uint32_t>(blocks_ * (kBlockTokens / kGuessTokens));
  // An odd step visits all parts of a block alike.
  const uint32_t stride = groups < 2 * kGuessGroups ? 1 : groups / kGuessGroups | 1;
  const uint32_t seen = HWY_DYNAMIC_DISPATCH(SampleTarget)(Split(), stride, absl::MakeSpan(sums),
                                                           absl::MakeSpan(counts));
  if (seen == 0) return 0.0F;
  const double scale = static_cast<double>(candidate_count_) / seen;
  size_t least = kQuarters - 1;
  if (top_k_ > 0) {
    double count = 0.0;
    const double wanted = kGuessedCount * top_k_ + 8.0 * scale;
    while (least > 0 && count < wanted) count += scale * counts[least--];
  }
  for (size_t place = 0; place < heads; ++place) {
    double rest = unread_[place];
    size_t quarter = 0;
    while (quarter < least) {
      rest += scale * static_cast<double>(sums[place * kQuarters + quarter]);
      if (!(rest <= kGuessedShare * limit_)) break;
      ++quarter;
    }
    least = quarter;
  }
  const auto threshold = std::bit_cast<float>(static_cast<int32_t>(least) << kQuarterBits);
  // A token whose share alone is beyond the limit is kept whatever the others are, so no threshold
  // above the limit suffices. A sample that met none of those knows no threshold at all: then it is
  // NaN, and must not be taken.
  const auto highest = static_cast<float>(limit_);
  return by_mass_ && !(threshold <= highest) ? highest : threshold;
}

// Makes entries of the candidates that score at least `threshold`. False if the others are too
// many to be dropped.
bool Chooser::Compact(float threshold) {
  scratch_->entries.clear();
  rests_ = unread_;
  HWY_DYNAMIC_DISPATCH(SplitTarget)
  (Split(), threshold, absl::MakeSpan(rests_), &scratch_->entries);
  if (scratch_->entries.size() < top_k_) return false;
  return std::all_of(rests_.begin(), rests_.end(), [this](double rest) { return rest <= limit_; });
}

// The lowest step of which a head cannot do without all tokens, given that it can do without those
// that are no entries; kStepsMax if there is none.
int32_t Chooser::ThresholdOf(size_t place, int32_t base) {
  std::vector<double>& sums = scratch_->sums;
  sums.assign(kStepsMax, 0.0);
  int32_t top = 0;
  for (const ChooseScratch::Entry& entry : scratch_->entries) {
    const int32_t step = std::min(StepOf(entry.score) - base, kStepsMax - 1);
    top = std::max(top, step);
    sums[static_cast<size_t>(step)] += static_cast<double>(ShareOf(place, entry.index));
  }
  double rest = rests_[place];
  for (int32_t step = 0; step <= top; ++step) {
    rest += sums[static_cast<size_t>(step)];
    if (!(rest <= limit_)) return step;
  }
  return kStepsMax;
}

// The highest step that leaves top_k entries at or above it.
int32_t Chooser::CountThreshold(uint32_t top_k, int32_t base) {
  if (top_k == 0) return kStepsMax;
  std::vector<uint32_t>& counts = scratch_->counts;
  counts.assign(kStepsMax, 0);
  for (const ChooseScratch::Entry& entry : scratch_->entries) {
    ++counts[static_cast<size_t>(std::min(StepOf(entry.score) - base, kStepsMax - 1))];
  }
  uint32_t count = 0;
  int32_t step = kStepsMax;
  while (step > 0 && count < top_k) count += counts[static_cast<size_t>(--step)];
  return step;
}

// The entries that the rules ask for, strongest first.
TokenMask Chooser::Select(uint32_t top_k, bool by_mass) {
  const std::vector<ChooseScratch::Entry>& entries = scratch_->entries;
  TokenMask kept(blocks_, 0);
  if (entries.empty()) return kept;
  int32_t base = std::numeric_limits<int32_t>::max();
  for (const ChooseScratch::Entry& entry : entries) base = std::min(base, StepOf(entry.score));
  int32_t threshold = CountThreshold(top_k, base);
  const size_t heads = by_mass ? heads_.size() : 0;
  for (size_t place = 0; place < heads; ++place) {
    const int32_t least = ThresholdOf(place, base);
    if (least < threshold) binding_head_ = heads_[place];
    threshold = std::min(threshold, least);
  }
  if (threshold == kStepsMax) return kept;
  const auto step_of = [base](const ChooseScratch::Entry& entry) {
    return std::min(StepOf(entry.score) - base, kStepsMax - 1);
  };
  const auto keep = [&kept](const ChooseScratch::Entry& entry) {
    kept[entry.index / kBlockTokens] |= uint64_t{1} << (entry.index % kBlockTokens);
  };
  // All above the threshold; those at it by position, until the rules hold.
  std::vector<double> rests(rests_.begin(), rests_.begin() + static_cast<std::ptrdiff_t>(heads));
  uint32_t count = 0;
  for (const ChooseScratch::Entry& entry : entries) {
    const int32_t step = step_of(entry);
    if (step > threshold) {
      keep(entry);
      ++count;
      continue;
    }
    for (size_t place = 0; place < heads; ++place) {
      rests[place] += static_cast<double>(ShareOf(place, entry.index));
    }
  }
  for (const ChooseScratch::Entry& entry : entries) {
    if (step_of(entry) != threshold) continue;
    const bool enough =
        count >= top_k &&
        std::all_of(rests.begin(), rests.end(), [this](double rest) { return rest <= limit_; });
    if (enough) break;
    keep(entry);
    ++count;
    for (size_t place = 0; place < heads; ++place) {
      rests[place] -= static_cast<double>(ShareOf(place, entry.index));
    }
  }
  return kept;
}

TokenMask Chooser::Choose(double sample_factor) {
  if (candidate_count_ == 0 || heads_.empty() || (top_k_ == 0 && !by_mass_)) {
    return TokenMask(blocks_, 0);
  }
  SetFactors(sample_factor);
  float threshold = GuessThreshold();
  // The last guess is 0, which leaves nothing out.
  for (uint32_t guess = 1; !Compact(threshold) && threshold > 0.0F; ++guess) {
    threshold = guess < kGuessesMax ? threshold / 4.0F : 0.0F;
  }
  TokenMask kept = Select(top_k_, by_mass_);
  if (task_.dilate_strongest == 0 || task_.dilate_radius == 0) return kept;
  const uint32_t strongest = std::min(task_.dilate_strongest, CountTokens(kept));
  TokenMask neighbours = Select(strongest, /*by_mass=*/false);
  Dilate(task_.dilate_radius, &neighbours);
  for (size_t i = 0; i < blocks_; ++i) kept[i] |= neighbours[i] & task_.candidates[i];
  return kept;
}

TokenMask Choose(const ChooseTask& task, ChooseScratch* scratch) {
  return Chooser(task, scratch).Choose();
}

}  // namespace kvservice
#endif  // HWY_ONCE
