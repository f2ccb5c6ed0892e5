#include "attention/cpu/score_kernel.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "attention/cpu/exp.h"
#include "attention/scan_terms.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/score_kernel.cc"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE void PrefetchVector(const std::byte* row, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t at = 0; at < bytes; at += kLine) hwy::Prefetch(row + at);
}

template <DType kType, class D>
void ScoreTyped(D d, const ScoreTask& task, Score* scores) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  const KvLayout& layout = task.shape->layout;
  const uint32_t dim = layout.head_dim;
  HWY_ALIGN float q[kHeadDimMax];
  std::array<uint16_t, kHeadDimMax> order;
  FillChannelOrder<kLanes>(layout, order.data());
  const float* qs = &task.queries->qs[size_t{task.head} * dim];
  for (uint32_t i = 0; i < dim; ++i) q[i] = qs[order[i]];
  for (const uint32_t position : task.positions) {
    PrefetchVector(task.view->Row(layout, task.kv_head, position), layout.vector_bytes());
  }
  // As in attend_kernel.cc: one chain of products per lane, the lanes, the scaled query.
  constexpr double kFixedRoundings = 1 + 4 + 1 + 1;
  const double roundings = static_cast<double>(dim) / kLanes + kFixedRoundings;
  const float cap = task.shape->logit_softcap;
  for (size_t i = 0; i < task.positions.size(); ++i) {
    const std::byte* row = task.view->Row(layout, task.kv_head, task.positions[i]);
    auto sum = hn::Zero(d);
    auto squares = hn::Zero(d);
    for (size_t c = 0; c < dim; c += 2 * kLanes) {
      hn::Vec<D> even;
      hn::Vec<D> odd;
      LoadChunk<kType>(d, row, c, &even, &odd);
      sum = hn::MulAdd(even, hn::Load(d, q + c), sum);
      squares = hn::MulAdd(even, even, squares);
      sum = hn::MulAdd(odd, hn::Load(d, q + c + kLanes), sum);
      squares = hn::MulAdd(odd, odd, squares);
    }
    const double logit = hn::GetLane(hn::SumOfLanes(d, sum));
    const double squared = hn::GetLane(hn::SumOfLanes(d, squares));
    const double norm = std::sqrt(squared * (1.0 + 0x1p-14) + 0x1p-120);
    const double error = task.queries->norm[task.head] * norm * roundings * 0x1p-24;
    // The soft-cap flattens; its own rounding in double is far below that of the logit.
    scores[i].logit = Softcap(cap, logit);
    scores[i].error = error * (1.0 + 0x1p-40) + static_cast<double>(cap) * 0x1p-40;
  }
}

// Largest squared norm of the values of a set; one that is not finite if there is one.
template <DType kType, class D>
float LargestSquares(D d, const KvLayout& layout, const KvView& view, uint32_t kv_head,
                     absl::Span<const uint64_t> tokens, uint32_t block_begin) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  float largest = 0.0F;
  for (uint32_t block = 0; block < tokens.size(); ++block) {
    for (uint64_t word = tokens[block]; word != 0; word &= word - 1) {
      const uint32_t token = static_cast<uint32_t>(std::countr_zero(word));
      const std::byte* row =
          view.Row(layout, kv_head, (block_begin + block) * kBlockTokens + token) +
          layout.vector_bytes();
      auto squares = hn::Zero(d);
      for (size_t c = 0; c < layout.head_dim; c += 2 * kLanes) {
        hn::Vec<D> even;
        hn::Vec<D> odd;
        LoadChunk<kType>(d, row, c, &even, &odd);
        squares = hn::MulAdd(even, even, squares);
        squares = hn::MulAdd(odd, odd, squares);
      }
      const float total = hn::GetLane(hn::SumOfLanes(d, squares));
      if (!(total <= std::numeric_limits<float>::max())) return total;
      largest = HWY_MAX(largest, total);
    }
  }
  return largest;
}

// Calls function.template operator()<dtype>(tag) with the widest vectors that head_dim allows: a
// chunk of two of them must divide it.
template <class Function>
HWY_INLINE auto WithTypes(const KvLayout& layout, const Function& function) {
  constexpr size_t kWide = 16;
  constexpr size_t kNarrow = 8;
  const auto with_lanes = [&](auto d) {
    switch (layout.dtype) {
      case DType::kFloat32:
        return function.template operator()<DType::kFloat32>(d);
      case DType::kFloat16:
        return function.template operator()<DType::kFloat16>(d);
      case DType::kBfloat16:
        break;
    }
    return function.template operator()<DType::kBfloat16>(d);
  };
  if (layout.head_dim % (2 * kWide) == 0) return with_lanes(hn::CappedTag<float, kWide>());
  return with_lanes(hn::CappedTag<float, kNarrow>());
}

void ScoreTokensTarget(const ScoreTask& task, Score* scores) {
  WithTypes(task.shape->layout, [&]<DType kType>(auto d) { ScoreTyped<kType>(d, task, scores); });
}

float LargestSquaresTarget(const KvLayout& layout, const KvView& view, uint32_t kv_head,
                           absl::Span<const uint64_t> tokens, uint32_t block_begin) {
  return WithTypes(layout, [&]<DType kType>(auto d) {
    return LargestSquares<kType>(d, layout, view, kv_head, tokens, block_begin);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(ScoreTokensTarget);
HWY_EXPORT(LargestSquaresTarget);

void ScoreTokens(const ScoreTask& task, Score* scores) {
  HWY_DYNAMIC_DISPATCH(ScoreTokensTarget)(task, scores);
}

ValueNorms BoundValueNorms(const LayerShape& shape, const KvView& view, uint32_t kv_head,
                           absl::Span<const uint64_t> tokens, uint32_t block_begin) {
  return ValueNormsOf(
      HWY_DYNAMIC_DISPATCH(LargestSquaresTarget)(shape.layout, view, kv_head, tokens, block_begin));
}

ValueNorms JoinValueNorms(ValueNorms unsketched, double sealed_max, double whole_max) {
  // What a stored norm may be above the largest norm of its page: the roundings of a normal float,
  // and the step between those below the normal range.
  constexpr double kDown = 1.0 - 0x1p-21;
  constexpr double kLeastStep = 0x1p-148;
  return {.lower = std::max(unsketched.lower, whole_max * kDown - kLeastStep),
          .upper = std::max(unsketched.upper, sealed_max)};
}

ValueNorms ValueNormsOf(double largest_squares) {
  // What squares and sums of up to 256 floats may be off by, and what may have underflowed.
  constexpr double kRoundoff = 0x1p-14;
  constexpr double kUnderflow = 0x1p-120;
  ValueNorms norms;
  if (largest_squares == 0.0) {
    norms.upper = std::sqrt(kUnderflow);
  } else if (!(largest_squares <= std::numeric_limits<double>::max())) {
    norms.upper = std::numeric_limits<double>::infinity();
  } else {
    norms.upper = std::sqrt(largest_squares * (1.0 + kRoundoff) + kUnderflow);
    norms.lower = std::sqrt(std::max(0.0, largest_squares * (1.0 - kRoundoff) - kUnderflow));
  }
  return norms;
}

}  // namespace kvservice
#endif  // HWY_ONCE
