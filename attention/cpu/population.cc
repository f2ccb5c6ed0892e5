#include "attention/cpu/population.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/cpu/choose.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/population.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, 16>;

// Weights of one page as integers, ceil(upper * scale * (1 + 2^-20)) and at least 1 for a token of
// the word that weighs anything. Returns their sum; 0 with `known` cleared if one cannot be
// represented. The factor covers its own rounding and that of the unit, whose logarithm is a
// multiple of ln 2 rounded to a double.
HWY_INLINE uint64_t FillPage(const float* HWY_RESTRICT upper, uint64_t word, float scale,
                             uint32_t* HWY_RESTRICT weights, bool* known) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const auto factor = hn::Set(d, scale);
  const auto margin = hn::Set(d, 1.0F + 0x1p-20F);
  const auto largest = hn::Set(d, 0x1.fp+30F);
  const auto low_bits = hn::Set(di, 0xFFFF);
  auto low = hn::Zero(di);
  auto high = hn::Zero(di);
  auto fits = hn::FirstN(d, hn::MaxLanes(d));
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    const uint64_t bits = word >> t;
    const auto in_set = hn::LoadMaskBits(d, reinterpret_cast<const uint8_t*>(&bits));
    const auto weight = hn::IfThenElseZero(in_set, hn::LoadU(d, upper + t));
    const auto scaled = hn::Mul(hn::Mul(weight, factor), margin);
    fits = hn::And(fits, hn::Le(scaled, largest));
    auto integer = hn::ConvertTo(di, hn::Ceil(hn::Min(scaled, largest)));
    const auto weighs = hn::RebindMask(di, hn::Gt(weight, hn::Zero(d)));
    integer = hn::IfThenElseZero(weighs, hn::Max(integer, hn::Set(di, 1)));
    hn::StoreU(integer, di, reinterpret_cast<int32_t*>(weights) + t);
    low = hn::Add(low, hn::And(integer, low_bits));
    high = hn::Add(high, hn::ShiftRight<16>(integer));
  }
  if (!hn::AllTrue(d, fits)) *known = false;
  const auto low_sum = static_cast<uint64_t>(hn::GetLane(hn::SumOfLanes(di, low)));
  const auto high_sum = static_cast<uint64_t>(hn::GetLane(hn::SumOfLanes(di, high)));
  return (high_sum << 16) + low_sum;
}

// The power of two above the largest weight of the word's tokens, in units of the page's; no less
// than what leaves room for a float of the scale. 0 if it is not finite, which FillPage finds.
HWY_INLINE int32_t PowerAbove(const float* HWY_RESTRICT upper, uint64_t word) {
  constexpr int32_t kPowerMin = -90;
  const FloatTag d;
  auto largest = hn::Zero(d);
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    const uint64_t bits = word >> t;
    const auto in_set = hn::LoadMaskBits(d, reinterpret_cast<const uint8_t*>(&bits));
    largest = hn::Max(largest, hn::IfThenElseZero(in_set, hn::LoadU(d, upper + t)));
  }
  const float weight = hn::GetLane(hn::MaxOfLanes(d, largest));
  if (weight == 0.0F) return kPowerMin;
  if (!(weight <= std::numeric_limits<float>::max())) return 0;
  return HWY_MAX(std::ilogb(weight) + 1, kPowerMin);
}

bool FillPopulationTarget(const ScanWeights& weights, uint32_t head,
                          absl::Span<const uint64_t> mask, Population* population) {
  constexpr int32_t kUnitBits = 30;
  const size_t first_page = weights.PageIndex(head, weights.block_begin);
  // Of the tokens in the mask, not of their pages: next to a token of the page that is read and
  // weighs more by 2^30, all others would weigh one unit, and sampling them would say nothing.
  int32_t reference = kReferenceMin;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] == 0) continue;
    const float* page =
        weights.Page(weights.upper, head, weights.block_begin + static_cast<uint32_t>(i));
    reference = HWY_MAX(reference, weights.reference[first_page + i] + PowerAbove(page, mask[i]));
  }
  population->block_begin = weights.block_begin;
  population->ref = reference * kLn2;
  population->weights.resize(mask.size() * kBlockTokens);
  std::vector<uint64_t> sums(mask.size());
  bool known = true;
  for (uint32_t i = 0; i < mask.size(); ++i) {
    uint32_t* page = &population->weights[size_t{i} * kBlockTokens];
    if (mask[i] == 0) {
      std::fill_n(page, kBlockTokens, 0);
      continue;
    }
    // Powers too small for a float leave weights of 1.
    const auto scale =
        static_cast<float>(ScaleOf(weights.reference[first_page + i] - reference + kUnitBits));
    sums[i] = FillPage(weights.Page(weights.upper, head, weights.block_begin + i), mask[i], scale,
                       page, &known);
  }
  population->sums.Assign(sums);
  return known;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(FillPopulationTarget);

bool FillPopulation(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask,
                    Population* population) {
  return HWY_DYNAMIC_DISPATCH(FillPopulationTarget)(weights, head, mask, population);
}

void ChooseHeaviest(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask,
                    double log_wanted, absl::Span<uint64_t> chosen) {
  // log2 of a weight, relative to the largest page, in eighths of octaves; what lies 64 octaves
  // below is in the last bin.
  constexpr int32_t kBinsPerOctave = 8;
  constexpr int32_t kBins = 64 * kBinsPerOctave;
  const size_t first_page = weights.PageIndex(head, weights.block_begin);
  int32_t top = kReferenceMin;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != 0) top = std::max(top, weights.reference[first_page + i]);
  }
  const auto bin_of = [&](uint32_t block, uint32_t token) {
    const float weight = weights.Page(weights.upper, head, weights.block_begin + block)[token];
    if (!(weight <= std::numeric_limits<float>::max())) return int32_t{0};
    if (weight == 0.0F) return kBins - 1;
    // The upper bits of a float are 8 steps per octave of its size, two octaves above the page's.
    const auto steps = static_cast<int32_t>(std::bit_cast<uint32_t>(weight) >> 20);
    constexpr int32_t kStepsAtFour = (127 + 2) * kBinsPerOctave;
    const int64_t below = int64_t{kBinsPerOctave} * (top - weights.reference[first_page + block]);
    return static_cast<int32_t>(std::clamp<int64_t>(kStepsAtFour - steps + below, 0, kBins - 1));
  };
  std::vector<double> sums(kBins, 0.0);  // in units of 2^top
  for (uint32_t block = 0; block < mask.size(); ++block) {
    if (mask[block] == 0) continue;
    const double scale = ScaleOf(weights.reference[first_page + block] - top);
    const float* page = weights.Page(weights.upper, head, weights.block_begin + block);
    for (uint64_t word = mask[block]; word != 0; word &= word - 1) {
      const auto token = static_cast<uint32_t>(std::countr_zero(word));
      sums[bin_of(block, token)] += static_cast<double>(page[token]) * scale;
    }
  }
  const double wanted = std::exp(log_wanted - top * kLn2);
  int32_t last = 0;
  for (double sum = sums[0]; last + 1 < kBins && !(sum >= wanted);) sum += sums[++last];
  for (uint32_t block = 0; block < mask.size(); ++block) {
    for (uint64_t word = mask[block]; word != 0; word &= word - 1) {
      const auto token = static_cast<uint32_t>(std::countr_zero(word));
      if (bin_of(block, token) <= last) chosen[block] |= uint64_t{1} << token;
    }
  }
}

}  // namespace kvservice
#endif  // HWY_ONCE
