// Sums of parts of pages of weights.
//
// Included once per target; the guard toggles.

#if defined(KVSERVICE_ATTENTION_CPU_PAGE_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSERVICE_ATTENTION_CPU_PAGE_SUM_INL_H_
#undef KVSERVICE_ATTENTION_CPU_PAGE_SUM_INL_H_
#else
#define KVSERVICE_ATTENTION_CPU_PAGE_SUM_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "attention/kv_layout.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, 16>;

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

// How many pages ahead weights are fetched, of which only some are needed.
constexpr size_t kPagesAhead = 16;

constexpr size_t kGroupsAhead = 8;

HWY_INLINE void PrefetchPage(const float* page) {
  constexpr size_t kLineFloats = 16;
  for (size_t i = 0; i < kBlockTokens; i += kLineFloats) hwy::Prefetch(page + i);
}

// The sum of the selected numbers of a page: at most 17 additions in a row.
HWY_INLINE float SumPage(const float* HWY_RESTRICT numbers, float page_sum, uint64_t word) {
  if (word == ~uint64_t{0}) return page_sum;
  return hn::GetLane(hn::SumOfLanes(FloatTag(), SumLanes(numbers, word)));
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#endif  // KVSERVICE_ATTENTION_CPU_PAGE_SUM_INL_H_
