#include "attention/cpu/scan_kernel.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <limits>

#include "attention/log_mass.h"
#include "attention/scan_terms.h"
#include "attention/sketch.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/scan_kernel.cc"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/code_dot-inl.h"
#include "attention/cpu/exp-inl.h"
#include "attention/cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Heads that share one pass over the codes.
constexpr uint32_t kScanTileHeads = 4;

// What all heads of a KV head need of one page, as floats.
struct PageNumbers {
  HWY_ALIGN float step[kHeadDimMax];
  HWY_ALIGN float mid[kHeadDimMax];
  HWY_ALIGN float cell[kHeadDimMax];  // h_c M_c
  HWY_ALIGN float projection[kSketchDirectionsMax][kBlockTokens];
  HWY_ALIGN float radius[kBlockTokens];  // kRadiusScale of every token
  // Rounded up.
  double step_norm = 0.0;
  double mid_norm = 0.0;
};

// What one head needs of one page.
struct HeadPage {
  float scale = 0.0F;  // s^ = base + scale * integer dot + projections
  float base = 0.0F;
  std::array<float, kSketchDirectionsMax> along{};  // qw_j ps_j
  float eps_base = 0.0F;
  float eps_radius = 0.0F;
  // Widens an upper and a lower logit for what comes after them: exponential and soft-cap.
  float margin = 0.0F;
  bool known = true;
};

// Root of a sum of squares that was added up in fp32, rounded up.
HWY_INLINE double NormUp(float squares) {
  return std::sqrt(static_cast<double>(squares) * (1.0 + 0x1p-14) + 0x1p-120);
}

template <bool kBounded>
HWY_INLINE void ReadPage(const SketchLayout& layout, const SketchPage& page,
                         const SketchTable& table, PageNumbers* numbers) {
  const ScanTag d;
  const hn::Rebind<hwy::float16_t, ScanTag> d16;
  const size_t lanes = hn::Lanes(d);
  auto step_squares = hn::Zero(d);
  auto mid_squares = hn::Zero(d);
  // The factor is a float: 13 bits.
  const auto half_margin = hn::Set(d, static_cast<float>(0.5 * kScanMargin));
  for (size_t c = 0; c < layout.dim; c += lanes) {
    const auto* step_bits = reinterpret_cast<const hwy::float16_t*>(page.step) + c;
    const auto step = hn::PromoteTo(d, hn::LoadU(d16, step_bits));
    const auto mid = hn::MulAdd(step, hn::Set(d, 8.0F), hn::LoadU(d, page.lo + c));
    hn::Store(step, d, numbers->step + c);
    hn::Store(mid, d, numbers->mid + c);
    if constexpr (kBounded) {
      const auto metric = hn::LoadU(d, &table.metric[c]);
      hn::Store(hn::Mul(hn::Mul(step, half_margin), metric), d, numbers->cell + c);
      step_squares = hn::MulAdd(step, step, step_squares);
      mid_squares = hn::MulAdd(mid, mid, mid_squares);
    }
  }
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    if (page.ps[j] == 0.0F) continue;
    for (uint32_t t = 0; t < kBlockTokens; ++t) {
      numbers->projection[j][t] = page.pj[size_t{j} * kBlockTokens + t];
    }
  }
  if constexpr (kBounded) {
    numbers->step_norm = NormUp(hn::GetLane(hn::SumOfLanes(d, step_squares)));
    numbers->mid_norm = NormUp(hn::GetLane(hn::SumOfLanes(d, mid_squares)));
    for (uint32_t t = 0; t < kBlockTokens; ++t) {
      numbers->radius[t] = kRadiusScale[page.r[t]];
    }
  }
}

// A number of at least 2^-126 rounded up to a float, several ulps above it.
HWY_INLINE float FloatAbove(double x) { return static_cast<float>(x * (1.0 + 0x1p-22)); }

// eps of one head and page: scan_terms.h with the roundings of this kernel. In units of u = 2^-24,
// and with m roundings in a sum over channels, s^ collects at most m + 10 times ||qs|| ||mid||
// (mid, the products and sum of mm, qs, and six sums that mm enters) and 8 m + 130 times ||qs||
// ||step|| (a_c, its residual, the sum of a_c, the dot as a float, its products, and the sums),
// each projection 8 times its size; A, B and P are relative to kScanMargin, and so is what rounding
// the factors missed.
//   sums   [4]: mm, A, B^2, sum_c a_c
//   miss   sum_c |a_c - what the integer stands for|; codes go up to 15
HWY_INLINE void BoundHeadPage(const SketchLayout& layout, const SketchPage& page,
                              const PageNumbers& numbers, double q_norm,
                              const ScanQueries::Head& head, const float* sums, double miss,
                              double softcap, HeadPage* terms) {
  constexpr double kUnit = 0x1p-24;
  constexpr double kTiny = 0x1p-100;
  // A chain per lane, its products, and the lanes' tree.
  const double m = static_cast<double>(layout.dim) / hn::MaxLanes(ScanTag()) + 5;
  double half_steps = 0.0;  // P
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    half_steps += std::fabs(static_cast<double>(terms->along[j])) / 2;
  }
  const double g =
      kUnit * (q_norm * ((m + 12) * numbers.mid_norm + (8 * m + 140) * numbers.step_norm) +
               16 * 127 * half_steps + 4 * head.weight * numbers.step_norm);
  const double eps_base =
      kScanMargin * (static_cast<double>(sums[1]) + half_steps + 15 * miss) + g + kTiny;
  const double eps_radius = kScanMargin * std::sqrt(static_cast<double>(sums[2]) + 0x1p-120) *
                                static_cast<double>(page.rmax) +
                            kTiny;
  terms->eps_base = FloatAbove(eps_base);
  terms->eps_radius = FloatAbove(eps_radius);
  const double largest = q_norm * (numbers.mid_norm + 16 * numbers.step_norm) +
                         2 * 127 * half_steps + eps_base + eps_radius;
  terms->known = largest <= kLogitMax;
  // Twice what the exponential may be off by; the other half is room for the roundings of s^ +-
  // eps.
  terms->margin = FloatAbove(2 * (kExpError + kExpArgumentError * largest) + softcap * kTanhError);
}

// Factors a_c = qs_c step_c of kHeads heads, [kHeads][head_dim], the largest of each, and [4] sums
// of each over channels: mm, and with bounds A, B^2 and sum_c a_c.
template <size_t kHeads, bool kBounded>
struct PageSums {
  HWY_ALIGN float a[kHeads][kHeadDimMax];
  float largest[kHeads];
  float sums[kScanTileHeads][4];

  HWY_INLINE void Compute(const SketchLayout& layout, const SketchPage& page,
                          const PageNumbers& numbers, const ScanTask& task, uint32_t head) {
    using V = hn::Vec<ScanTag>;
    const ScanTag d;
    const ScanQueries& queries = *task.scan_queries;
    const float* qs = &task.queries->qs[size_t{head} * layout.dim];
    const float* x = kBounded ? &queries.x[size_t{head} * layout.dim] : nullptr;
    V rows[kScanTileHeads][4];
    V most[kHeads];
    V mu[kHeads];
#pragma GCC unroll 4
    for (size_t h = 0; h < kScanTileHeads; ++h) {
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) rows[h][i] = hn::Zero(d);
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      most[h] = hn::Zero(d);
      mu[h] = hn::Set(d, queries.heads[head + h].x_norm / HWY_MAX(page.hn, 1e-30F));
    }
    for (size_t c = 0; c < layout.dim; c += hn::Lanes(d)) {
      const V mid = hn::Load(d, numbers.mid + c);
      const V step = hn::Load(d, numbers.step + c);
#pragma GCC unroll 4
      for (size_t h = 0; h < kHeads; ++h) {
        const V q = hn::LoadU(d, qs + h * layout.dim + c);
        const V factor = hn::Mul(q, step);
        hn::Store(factor, d, a[h] + c);
        most[h] = hn::Max(most[h], hn::Abs(factor));
        rows[h][0] = hn::MulAdd(q, mid, rows[h][0]);
        if constexpr (kBounded) {
          const V cell = hn::Load(d, numbers.cell + c);
          const V slope = hn::LoadU(d, x + h * layout.dim + c);
          const V b = hn::Min(slope, hn::Mul(mu[h], cell));
          rows[h][1] = hn::MulAdd(cell, hn::Sub(slope, b), rows[h][1]);
          rows[h][2] = hn::MulAdd(b, b, rows[h][2]);
          rows[h][3] = hn::Add(factor, rows[h][3]);
        }
      }
    }
    StoreRowSums(d, rows, sums);
    for (size_t h = 0; h < kHeads; ++h) largest[h] = hn::GetLane(hn::MaxOfLanes(d, most[h]));
  }
};

// What scanning one page takes for kHeads heads; leaves their factors in `factors`.
template <size_t kHeads, bool kBounded>
HWY_INLINE void MakeHeadPages(const ScanTask& task, const SketchLayout& layout,
                              const SketchPage& page, const PageNumbers& numbers, uint32_t head,
                              CodeFactors<kHeads, kBounded>* factors, HeadPage* terms) {
  const ScanTag d;
  const ScanQueries& queries = *task.scan_queries;
  PageSums<kHeads, kBounded> of;
  of.Compute(layout, page, numbers, task, head);
  // Over lanes: what the factors of each head add up to, or miss.
  hn::Vec<ScanTag> rows[kScanTileHeads][4];
#pragma GCC unroll 4
  for (size_t h = 0; h < kScanTileHeads; ++h) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) rows[h][i] = hn::Zero(d);
  }
  for (size_t h = 0; h < kHeads; ++h) {
    const FactorSums sums = factors->Quantize(of.a[h], layout.dim, of.largest[h], h);
    terms[h].scale = sums.scale;
    rows[h][0] = sums.sum;
  }
  float factor_sums[kScanTileHeads][4];
  StoreRowSums(d, rows, factor_sums);
  for (size_t h = 0; h < kHeads; ++h) {
    const ScanQueries::Head& query = queries.heads[head + h];
    for (uint32_t j = 0; j < layout.direction_count; ++j) {
      terms[h].along[j] = query.qw[j] * page.ps[j];
    }
    if constexpr (kBounded) {
      terms[h].base = of.sums[h][0] - 7.5F * of.sums[h][3];
      BoundHeadPage(layout, page, numbers, task.queries->norm[head + h], query, of.sums[h],
                    static_cast<double>(factor_sums[h][0]),
                    static_cast<double>(task.shape->logit_softcap), &terms[h]);
    } else {
      // Coarse factors are centred with their own sum, else what they miss would shift whole pages.
      terms[h].base = of.sums[h][0] - 7.5F * terms[h].scale * factor_sums[h][0];
    }
  }
}

// Logits of one head's page in registers' order: estimate, and with bounds their ends.
struct PageLogits {
  HWY_ALIGN float estimate[kBlockTokens];
  HWY_ALIGN float upper[kBlockTokens];
  HWY_ALIGN float lower[kBlockTokens];
};

// Returns the largest number that will be exponentiated.
template <bool kBounded>
HWY_INLINE float MakeLogits(const SketchLayout& layout, const PageNumbers& numbers,
                            const HeadPage& terms, float softcap, const float* HWY_RESTRICT dots,
                            PageLogits* logits) {
  const ScanTag d;
  const auto cap = hn::Set(d, softcap);
  auto top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    auto s = hn::MulAdd(hn::Load(d, dots + t), hn::Set(d, terms.scale), hn::Set(d, terms.base));
    for (uint32_t j = 0; j < layout.direction_count; ++j) {
      if (terms.along[j] == 0.0F) continue;
      s = hn::MulAdd(hn::Load(d, numbers.projection[j] + t), hn::Set(d, terms.along[j]), s);
    }
    if constexpr (kBounded) {
      const auto eps = hn::MulAdd(hn::Load(d, numbers.radius + t), hn::Set(d, terms.eps_radius),
                                  hn::Set(d, terms.eps_base));
      auto upper = hn::Add(s, eps);
      auto lower = hn::Sub(s, eps);
      if (softcap > 0.0F) {
        upper = SoftcapVector(d, upper, cap);
        lower = SoftcapVector(d, lower, cap);
      }
      upper = hn::Add(upper, hn::Set(d, terms.margin));
      hn::Store(upper, d, logits->upper + t);
      hn::Store(hn::Sub(lower, hn::Set(d, terms.margin)), d, logits->lower + t);
      if (terms.known) top = hn::Max(top, upper);
    }
    if (softcap > 0.0F) s = SoftcapVector(d, s, cap);
    hn::Store(s, d, logits->estimate + t);
    if (!kBounded || !terms.known) top = hn::Max(top, s);
  }
  return hn::GetLane(hn::MaxOfLanes(d, top));
}

// The power of two next to e^top.
HWY_INLINE int32_t ReferenceOf(float top) {
  const ScanTag d;
  const CodeTag di;
  const auto x = hn::Max(hn::Set(d, kLogitMin), hn::Min(hn::Set(d, -kLogitMin), hn::Set(d, top)));
  const int32_t exponent = hn::GetLane(hn::BitCast(di, ExpExponentBits(d, x))) - kRoundingMagicBits;
  return HWY_MAX(exponent, kReferenceMin);
}

template <bool kBounded>
HWY_INLINE void StoreWeights(const HeadPage& terms, const PageLogits& logits, float top,
                             uint32_t head, uint32_t block, ScanWeights* weights) {
  const ScanTag d;
  const CodeTag di;
  const int32_t reference = ReferenceOf(top);
  const auto reference_lanes = hn::Set(di, reference);
  weights->reference[weights->PageIndex(head, block)] = reference;
  float* estimate = weights->Page(weights->estimate, head, block);
  auto sum = hn::Zero(d);
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    const auto weight = ExpScaled(d, hn::Load(d, logits.estimate + t), reference_lanes);
    hn::StoreU(weight, d, estimate + t);
    sum = hn::Add(sum, weight);
  }
  weights->estimate_sum[weights->PageIndex(head, block)] = hn::GetLane(hn::SumOfLanes(d, sum));
  if constexpr (kBounded) {
    float* upper = weights->Page(weights->upper, head, block);
    float* lower = weights->Page(weights->lower, head, block);
    // The least weight that an exponential which underflowed may stand for.
    const auto least = hn::Set(d, terms.known ? 0x1p-126F : std::numeric_limits<float>::infinity());
    for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
      const auto high = ExpScaled(d, hn::Load(d, logits.upper + t), reference_lanes);
      // Written so that NaN stays.
      hn::StoreU(hn::IfThenElse(hn::Lt(high, least), least, high), d, upper + t);
      const auto low = ExpScaled(d, hn::Load(d, logits.lower + t), reference_lanes);
      hn::StoreU(terms.known ? low : hn::Zero(d), d, lower + t);
    }
  }
}

// Tokens that the head does not see weigh nothing.
HWY_INLINE void ZeroUnseen(const HeadQueries& queries, uint32_t head, uint32_t block,
                           ScanWeights* weights) {
  const uint32_t begin = block * kBlockTokens;
  const uint32_t visible_begin = queries.visible_begin[head];
  const uint32_t visible_end = queries.visible_end[head];
  if (begin >= visible_begin && begin + kBlockTokens <= visible_end) return;
  float seen_sum = 0.0F;
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    float& estimate = weights->Page(weights->estimate, head, block)[t];
    if (begin + t >= visible_begin && begin + t < visible_end) {
      seen_sum += estimate;
      continue;
    }
    estimate = 0.0F;
    if (!weights->bounded) continue;
    weights->Page(weights->upper, head, block)[t] = 0.0F;
    weights->Page(weights->lower, head, block)[t] = 0.0F;
  }
  weights->estimate_sum[weights->PageIndex(head, block)] = seen_sum;
}

template <bool kBounded, size_t kHeads>
HWY_INLINE void ScanTile(const ScanTask& task, const SketchLayout& layout, const SketchPage& page,
                         const std::byte* next, const PageNumbers& numbers, uint32_t head,
                         uint32_t block, ScanWeights* weights) {
  CodeFactors<kHeads, kBounded> factors;
  std::array<HeadPage, kHeads> terms;
  MakeHeadPages<kHeads, kBounded>(task, layout, page, numbers, head, &factors, terms.data());
  HWY_ALIGN float dots[kHeads][kBlockTokens];
  factors.Dot(page.codes, next, layout.dim, dots);
  PageLogits logits[kHeads];
  float top[kHeads];
  for (uint32_t h = 0; h < kHeads; ++h) {
    top[h] = MakeLogits<kBounded>(layout, numbers, terms[h], task.shape->logit_softcap, dots[h],
                                  &logits[h]);
  }
  for (uint32_t h = 0; h < kHeads; ++h) {
    StoreWeights<kBounded>(terms[h], logits[h], top[h], head + h, block, weights);
    ZeroUnseen(*task.queries, head + h, block, weights);
  }
}

template <bool kBounded>
HWY_INLINE void ScanPage(const ScanTask& task, const SketchLayout& layout, const std::byte* bytes,
                         const std::byte* next, uint32_t block, ScanWeights* weights) {
  const SketchPage page(layout, bytes);
  // Its codes come in while this page's are multiplied.
  for (size_t at = layout.lo; at < layout.page_bytes; at += 64) hwy::Prefetch(next + at);
  PageNumbers numbers;
  ReadPage<kBounded>(layout, page, *task.table, &numbers);
  const uint32_t heads = task.queries->head_count;
  uint32_t head = 0;
  for (; head + kScanTileHeads <= heads; head += kScanTileHeads) {
    ScanTile<kBounded, kScanTileHeads>(task, layout, page, next, numbers, head, block, weights);
  }
  switch (heads - head) {
    case 3:
      return ScanTile<kBounded, 3>(task, layout, page, next, numbers, head, block, weights);
    case 2:
      return ScanTile<kBounded, 2>(task, layout, page, next, numbers, head, block, weights);
    case 1:
      return ScanTile<kBounded, 1>(task, layout, page, next, numbers, head, block, weights);
    default:
      return;
  }
}

template <bool kBounded>
void ScanAll(const ScanTask& task, ScanWeights* weights) {
  const SketchLayout layout(task.shape->layout.head_dim);
  const size_t offset = size_t{task.kv_head} * layout.page_bytes;
  size_t at = 0;
  const auto skip = [&task](size_t from) {
    while (from < task.tokens.size() && task.tokens[from] == 0) ++from;
    return from;
  };
  for (at = skip(0); at < task.tokens.size();) {
    const uint32_t block = task.block_begin + static_cast<uint32_t>(at);
    const std::byte* bytes = task.view->sketches[block] + offset;
    at = skip(at + 1);
    const std::byte* next =
        at < task.tokens.size() ? task.view->sketches[task.block_begin + at] + offset : bytes;
    ScanPage<kBounded>(task, layout, bytes, next, block, weights);
  }
}

void ScanPagesTarget(const ScanTask& task, ScanWeights* weights) {
  return weights->bounded ? ScanAll<true>(task, weights) : ScanAll<false>(task, weights);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(ScanPagesTarget);

void PrepareScan(const LayerShape& shape, absl::Span<const float* const> q,
                 const SketchTable& table, bool bounded, ScanQueries* queries) {
  const uint32_t head_dim = shape.layout.head_dim;
  const auto head_count = static_cast<uint32_t>(q.size());
  // What the double arithmetic of the query terms may be off by, many times over.
  constexpr double kUp = 1.0 + 0x1p-40;
  queries->heads.assign(head_count, {});
  queries->x.resize(bounded ? size_t{head_count} * head_dim : 0);
  for (uint32_t head = 0; head < head_count; ++head) {
    const QueryTerms<double> terms = MakeQueryTerms<double>(head_dim, shape.scale, q[head], table);
    ScanQueries::Head& to = queries->heads[head];
    for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
      to.qw[j] = static_cast<float>(terms.qw[j]);
    }
    to.x_norm = static_cast<float>(terms.x_norm);
    to.weight = terms.weight * kUp;
    if (!bounded) continue;
    for (uint32_t c = 0; c < head_dim; ++c) {
      queries->x[size_t{head} * head_dim + c] = RoundUpToFloat(terms.x[c] * kUp);
    }
  }
}

void ScanWeights::Resize(uint32_t heads, uint32_t first_block, uint32_t blocks, bool with_bounds) {
  head_count = heads;
  block_begin = first_block;
  block_count = blocks;
  bounded = with_bounds;
  const size_t pages = size_t{heads} * blocks;
  // Contents do not matter: growing only keeps a steady state free of writes.
  const auto grow = [](size_t size, auto* numbers) {
    if (numbers->size() < size) numbers->resize(size);
  };
  grow(pages, &reference);
  grow(pages, &estimate_sum);
  grow(pages * kBlockTokens, &estimate);
  if (with_bounds) {
    grow(pages * kBlockTokens, &upper);
    grow(pages * kBlockTokens, &lower);
  }
}

void ScanPages(const ScanTask& task, ScanWeights* weights) {
  HWY_DYNAMIC_DISPATCH(ScanPagesTarget)(task, weights);
}

}  // namespace kvservice
#endif  // HWY_ONCE
