#include "attention/cpu/scan_kernel.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <limits>

#include "attention/cpu/radius.h"
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

// Heads that share one pass over the codes, and pages that are prepared together: what is computed
// once per page and head then fills vectors, and no page waits for the divisions and roots of its
// own.
constexpr uint32_t kTileHeads = 4;
constexpr uint32_t kBatchPages = 4;
constexpr uint32_t kBatchLanes = kTileHeads * kBatchPages;
using TileTag = hn::CappedTag<float, kTileHeads>;
using Vector = hn::Vec<ScanTag>;

// What all heads of a KV head need of one page, as floats.
struct PageNumbers {
  HWY_ALIGN float step[kHeadDimMax];
  HWY_ALIGN float mid[kHeadDimMax];
  HWY_ALIGN float cell[kHeadDimMax];  // h_c M_c
  HWY_ALIGN float projection[kSketchDirectionsMax][kBlockTokens];
  HWY_ALIGN float radius[kBlockTokens];  // at least kRadiusScale of every token
};

// Pages that are scanned together. Lanes: [page][head of the tile].
struct Batch {
  HWY_INLINE explicit Batch(const SketchLayout& at) : layout(at) {}

  const SketchLayout& layout;
  uint32_t count = 0;
  const std::byte* bytes[kBatchPages];
  // Pages to fetch while these are worked on.
  const std::byte* next[kBatchPages];
  uint32_t block[kBatchPages];
  PageNumbers numbers[kBatchPages];
  // Of each page, in all its lanes.
  HWY_ALIGN float mid_squares[kBatchLanes] = {};
  HWY_ALIGN float step_squares[kBatchLanes] = {};
  HWY_ALIGN float rmax[kBatchLanes] = {};
  HWY_ALIGN float mean_radius[kBatchLanes] = {};
};

// What the heads of a tile need of the pages of a batch.
struct BatchTerms {
  HWY_ALIGN float scale[kBatchLanes] = {};  // s^ = base + scale * integer dot + projections
  HWY_ALIGN float base[kBatchLanes] = {};   // with bounds: plus what of eps all tokens share
  HWY_ALIGN float along[kSketchDirectionsMax][kBatchLanes] = {};  // qw_j ps_j
  // With bounds. A and B^2, and what becomes of them:
  HWY_ALIGN float outside_ball[kBatchLanes] = {};
  HWY_ALIGN float ball_squares[kBatchLanes] = {};
  HWY_ALIGN float eps_radius[kBatchLanes];
  // Widens a logit after the soft-cap: for the soft-cap itself, the exponential, and the roundings
  // in between.
  HWY_ALIGN float margin[kBatchLanes];
  HWY_ALIGN float lower_share[kBatchLanes];  // zero where nothing is known
  HWY_ALIGN float estimate_share[kBatchLanes];
  HWY_ALIGN int64_t known[kBatchLanes];
};

HWY_INLINE void FillTile(float x, float* tile) {
  hn::Store(hn::Set(TileTag(), x), TileTag(), tile);
}

// Decodes the radii of a page; returns their mean.
HWY_INLINE float ReadRadii(const uint8_t* codes, float* HWY_RESTRICT radius) {
  const ScanTag d;
  auto sum = hn::Zero(d);
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    Vector value;
    if constexpr (hn::MaxLanes(ScanTag()) == kRadiusParts) {
      const CodeTag di;
      const hn::Rebind<uint8_t, ScanTag> d8;
      const auto code = hn::PromoteTo(di, hn::LoadU(d8, codes + t));
      const auto high = hn::IndicesFromVec(d, hn::ShiftRight<4>(code));
      const auto low = hn::IndicesFromVec(d, hn::And(code, hn::Set(di, 15)));
      value = hn::Mul(hn::TableLookupLanes(hn::Load(d, kRadiusOf.high.data()), high),
                      hn::TableLookupLanes(hn::Load(d, kRadiusOf.low.data()), low));
    } else {
      HWY_ALIGN float lanes[hn::MaxLanes(ScanTag())];
      for (size_t i = 0; i < hn::Lanes(d); ++i) lanes[i] = kRadiusScale[codes[t + i]];
      value = hn::Load(d, lanes);
    }
    hn::Store(value, d, radius + t);
    sum = hn::Add(sum, value);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum)) * (1.0F / kBlockTokens);
}

template <bool kBounded>
HWY_INLINE void ReadPage(const SketchTable& table, uint32_t index, Batch* batch) {
  const ScanTag d;
  const hn::Rebind<hwy::float16_t, ScanTag> d16;
  const hn::Rebind<int8_t, ScanTag> d8;
  const CodeTag di;
  const SketchLayout& layout = batch->layout;
  const SketchPage page(layout, batch->bytes[index]);
  PageNumbers& numbers = batch->numbers[index];
  const size_t lanes = hn::Lanes(d);
  auto step_squares = hn::Zero(d);
  auto mid_squares = hn::Zero(d);
  // The factor is a float: 13 bits.
  const auto half_margin = hn::Set(d, static_cast<float>(0.5 * kScanMargin));
  for (size_t c = 0; c < layout.dim; c += lanes) {
    const auto* step_bits = reinterpret_cast<const hwy::float16_t*>(page.step) + c;
    const auto step = hn::PromoteTo(d, hn::LoadU(d16, step_bits));
    const auto mid = hn::MulAdd(step, hn::Set(d, 8.0F), hn::LoadU(d, page.lo + c));
    hn::Store(step, d, numbers.step + c);
    hn::Store(mid, d, numbers.mid + c);
    if constexpr (kBounded) {
      const auto metric = hn::LoadU(d, &table.metric[c]);
      hn::Store(hn::Mul(hn::Mul(step, half_margin), metric), d, numbers.cell + c);
      step_squares = hn::MulAdd(step, step, step_squares);
      mid_squares = hn::MulAdd(mid, mid, mid_squares);
    }
  }
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    if (page.ps[j] == 0.0F) continue;
    for (uint32_t t = 0; t < kBlockTokens; t += lanes) {
      const auto pj = hn::LoadU(d8, page.pj + size_t{j} * kBlockTokens + t);
      hn::Store(hn::ConvertTo(d, hn::PromoteTo(di, pj)), d, numbers.projection[j] + t);
    }
  }
  if constexpr (kBounded) {
    const size_t tile = size_t{index} * kTileHeads;
    FillTile(hn::GetLane(hn::SumOfLanes(d, step_squares)), batch->step_squares + tile);
    FillTile(hn::GetLane(hn::SumOfLanes(d, mid_squares)), batch->mid_squares + tile);
    FillTile(page.rmax, batch->rmax + tile);
    FillTile(ReadRadii(page.r, numbers.radius), batch->mean_radius + tile);
  }
}

// Sums over channels, over the lanes of a row for each head: rows [0] mm, and with bounds [1] A and
// [2] B^2; and the largest |qs_c step_c| of each head.
template <size_t kHeads, bool kBounded>
HWY_INLINE void AddChannels(size_t dim, const PageNumbers& numbers, const float* HWY_RESTRICT qs,
                            const float* HWY_RESTRICT x, const float* HWY_RESTRICT mu,
                            Vector (*rows)[kTileHeads], Vector* most) {
  const ScanTag d;
  Vector slopes[kHeads];
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) slopes[h] = hn::Set(d, kBounded ? mu[h] : 0.0F);
  for (size_t c = 0; c < dim; c += hn::Lanes(d)) {
    const auto mid = hn::Load(d, numbers.mid + c);
    const auto step = hn::Load(d, numbers.step + c);
    const auto cell = hn::Load(d, (kBounded ? numbers.cell : numbers.mid) + c);
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      const auto q = hn::LoadU(d, qs + h * dim + c);
      most[h] = hn::Max(most[h], hn::Abs(hn::Mul(q, step)));
      rows[0][h] = hn::MulAdd(q, mid, rows[0][h]);
      if constexpr (kBounded) {
        const auto slope = hn::LoadU(d, x + h * dim + c);
        const auto b = hn::Min(slope, hn::Mul(slopes[h], cell));
        rows[1][h] = hn::MulAdd(cell, hn::Sub(slope, b), rows[1][h]);
        rows[2][h] = hn::MulAdd(b, b, rows[2][h]);
      }
    }
  }
}

// The integer factors of one page and tile, and the sums that its terms are made from.
template <size_t kHeads, bool kBounded>
HWY_INLINE void PreparePage(const ScanTask& task, const Batch& batch, uint32_t index, uint32_t head,
                            CodeFactors<kHeads, kBounded>* factors, BatchTerms* terms) {
  const ScanTag d;
  const TileTag tile;
  const SketchLayout& layout = batch.layout;
  const SketchPage page(layout, batch.bytes[index]);
  const size_t at = size_t{index} * kTileHeads;
  const ScanQueries& queries = *task.scan_queries;
  const float* qs = &task.queries->qs[size_t{head} * layout.dim];
  const float* x = kBounded ? &queries.x[size_t{head} * layout.dim] : nullptr;
  Vector rows[4][kTileHeads];
  Vector most[kTileHeads];
#pragma GCC unroll 4
  for (size_t h = 0; h < kTileHeads; ++h) {
    most[h] = hn::Zero(d);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) rows[i][h] = hn::Zero(d);
  }
  HWY_ALIGN float mu[kTileHeads] = {};
  if constexpr (kBounded) {
    const auto x_norm = hn::LoadU(tile, &queries.x_norm[head]);
    hn::Store(hn::Div(x_norm, hn::Set(tile, HWY_MAX(page.hn, 1e-30F))), tile, mu);
  }
  AddChannels<kHeads, kBounded>(layout.dim, batch.numbers[index], qs, x, mu, rows, most);

  const auto limit = hn::Set(tile, kBounded ? kFineLimit : kCoarseLimit);
  const auto largest = MaxOfFour(d, most);
  const auto usable = hn::Gt(largest, hn::Set(tile, kFactorLeast));
  const auto scale = hn::IfThenElseZero(usable, hn::Div(largest, limit));
  HWY_ALIGN float inverse[kTileHeads];
  hn::Store(hn::IfThenElseZero(usable, hn::Div(limit, largest)), tile, inverse);
  factors->Quantize(qs, batch.numbers[index].step, layout.dim, inverse, rows[3]);
  HWY_ALIGN float sums[4][kTileHeads];
  StoreRowSums(d, rows, sums);
  // Centred with their own sum, so that what factors miss meets codes between -7.5 and 7.5.
  const auto centre = hn::Mul(hn::Mul(scale, hn::Set(tile, 7.5F)), hn::Load(tile, sums[3]));
  hn::Store(scale, tile, terms->scale + at);
  hn::Store(hn::Sub(hn::Load(tile, sums[0]), centre), tile, terms->base + at);
  hn::Store(hn::Load(tile, sums[1]), tile, terms->outside_ball + at);
  hn::Store(hn::Load(tile, sums[2]), tile, terms->ball_squares + at);
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    const auto qw = hn::LoadU(tile, &queries.qw[j][head]);
    hn::Store(hn::Mul(qw, hn::Set(tile, page.ps[j])), tile, terms->along[j] + at);
  }
}

// The bounds of a batch: scan_terms.h with the roundings of this kernel. In units of u = 2^-24, and
// with m roundings in a sum over channels, s^ collects at most m + 10 times ||qs|| ||mid|| (mid,
// qs, the products and sum of mm, base, the addition of eps to it, the dot, and four projections)
// and 121 times ||qs|| ||step|| (qs 8, a_c 7.5, base and its parts 37.5, the dot as a float and its
// product 30, three sums and four projections 37.5), each projection 8 times its size. A, B and P
// are relative to kScanMargin. Rounding a factor misses up to kFactorMiss scale (CodeFactors), for
// codes that lie up to 7.5 from their centre, or kFactorLeast in all; nothing where qs is zero.
// What eps itself is rounded by on its way to a logit is below 16 u.
class BatchBounds {
 public:
  HWY_INLINE BatchBounds(const ScanTask& task, const Batch& batch, uint32_t head)
      : batch_(batch), softcap_(task.shape->logit_softcap) {
    const ScanQueries& queries = *task.scan_queries;
    for (size_t i = 0; i < kBatchLanes; ++i) {
      q_norm_[i] = queries.norm[head + i % kTileHeads];
      weight_[i] = queries.weight[head + i % kTileHeads];
      miss_[i] = kFactorMiss * 7.5 * queries.used[head + i % kTileHeads];
    }
  }

  HWY_INLINE void Bound(BatchTerms* terms) const {
    for (size_t i = 0; i < kBatchLanes; i += hn::Lanes(DoubleTag())) BoundLanes(i, terms);
    const ScanTag d;
    const auto zero = hn::Zero(CodeTag());
    for (float* share : {terms->lower_share, terms->estimate_share}) {
      for (size_t i = 0; i < kBatchLanes; i += hn::Lanes(d)) {
        hn::Store(ExpScaled(d, hn::Load(d, share + i), zero), d, share + i);
      }
    }
  }

 private:
  using DoubleTag = hn::Repartition<double, ScanTag>;
  using HalfTag = hn::Rebind<float, DoubleTag>;
  using Doubles = hn::Vec<DoubleTag>;

  HWY_INLINE static Doubles Set(double x) { return hn::Set(DoubleTag(), x); }
  HWY_INLINE static Doubles Load(const float* x) {
    return hn::PromoteTo(DoubleTag(), hn::LoadU(HalfTag(), x));
  }
  HWY_INLINE static void Store(Doubles x, float* to) {
    hn::StoreU(hn::DemoteTo(HalfTag(), x), HalfTag(), to);
  }
  // Root of a sum of squares that was added up in fp32, rounded up.
  HWY_INLINE static Doubles NormUp(const float* squares) {
    return hn::Sqrt(hn::MulAdd(Load(squares), Set(1.0 + 0x1p-14), Set(0x1p-120)));
  }

  // Sets every field but `base`, of which it raises what is there; shares as logs.
  HWY_INLINE void BoundLanes(size_t i, BatchTerms* terms) const {
    constexpr double kUnit = 0x1p-24;
    constexpr double kTiny = 0x1p-88;  // above 256 * 7.5 * kFactorLeast, and above underflow
    constexpr double kUp = 1.0 + 0x1p-20;
    const auto dim = static_cast<double>(batch_.layout.dim);
    // A chain per lane, its products, and the lanes' tree.
    const double m = dim / hn::MaxLanes(ScanTag()) + 5;
    const Doubles mid_norm = NormUp(batch_.mid_squares + i);
    const Doubles step_norm = NormUp(batch_.step_squares + i);
    const Doubles q_norm = hn::LoadU(DoubleTag(), q_norm_ + i);
    const Doubles weight = hn::LoadU(DoubleTag(), weight_ + i);
    Doubles half_steps = hn::Zero(DoubleTag());  // P
    for (uint32_t j = 0; j < batch_.layout.direction_count; ++j) {
      half_steps = hn::MulAdd(hn::Abs(Load(terms->along[j] + i)), Set(0.5), half_steps);
    }
    const Doubles of_norm =
        hn::MulAdd(mid_norm, Set(kUnit * (m + 12)), hn::Mul(step_norm, Set(kUnit * 140)));
    Doubles rounding = hn::MulAdd(q_norm, of_norm, Set(kTiny));
    rounding = hn::MulAdd(hn::Mul(weight, step_norm), Set(kUnit * 4), rounding);
    rounding = hn::MulAdd(half_steps, Set(kUnit * 16 * 127), rounding);
    const Doubles miss = hn::LoadU(DoubleTag(), miss_ + i);
    const Doubles missed = hn::MulAdd(Load(terms->scale + i), miss, half_steps);
    const Doubles outside = hn::Add(Load(terms->outside_ball + i), missed);
    const Doubles eps_base = hn::Mul(hn::MulAdd(outside, Set(kScanMargin), rounding), Set(kUp));
    const Doubles ball = hn::Sqrt(hn::Add(Load(terms->ball_squares + i), Set(0x1p-120)));
    const Doubles radius = hn::Mul(Load(batch_.rmax + i), Set(kScanMargin));
    const Doubles eps_radius = hn::Mul(hn::MulAdd(ball, radius, Set(kTiny)), Set(kUp));
    const Doubles reach = hn::Mul(q_norm, hn::MulAdd(step_norm, Set(16), mid_norm));
    const Doubles largest =
        hn::Add(hn::MulAdd(half_steps, Set(2 * 127), reach), hn::Add(eps_base, eps_radius));
    // Twice what the exponential may be off by; the other half is room for the roundings of s^ +-
    // eps.
    const auto softcap_error = static_cast<double>(softcap_) * kTanhError;
    const Doubles margin = hn::MulAdd(largest, Set(2 * kExpArgumentError * kUp),
                                      Set(2 * kExpError * kUp + softcap_error));
    Store(eps_radius, terms->eps_radius + i);
    Store(margin, terms->margin + i);
    const Doubles raised = hn::Add(Load(terms->base + i), eps_base);
    Store(softcap_ > 0.0F ? raised : hn::Add(raised, margin), terms->base + i);
    // An upper end lies at most 2 eps + 3 margin above the logit (twice eps because what was added
    // bounds the error on either side; the margins are its own, the exponential's and the
    // soft-cap's); two more are for the exponential of this.
    const Doubles whole = hn::MulAdd(eps_radius, Set(1.0 + 0x1p-16), eps_base);
    const Doubles lower = hn::MulAdd(margin, Set(5.0), hn::Add(whole, whole));
    const Doubles middle = hn::MulAdd(eps_radius, Load(batch_.mean_radius + i), eps_base);
    // Written so that NaN is not known.
    const auto known = hn::Le(largest, Set(kLogitMax));
    const Doubles nothing = Set(static_cast<double>(kLogitMin));
    Store(hn::IfThenElse(known, hn::Neg(lower), nothing), terms->lower_share + i);
    Store(hn::IfThenElse(known, hn::Neg(hn::Add(middle, margin)), nothing),
          terms->estimate_share + i);
    const hn::RebindToSigned<DoubleTag> di;
    const auto bits = hn::IfThenElseZero(hn::RebindMask(di, known), hn::Set(di, 1));
    hn::StoreU(bits, di, terms->known + i);
  }

  const Batch& batch_;
  const float softcap_;
  HWY_ALIGN double q_norm_[kBatchLanes];
  HWY_ALIGN double weight_[kBatchLanes];
  HWY_ALIGN double miss_[kBatchLanes];  // of factors, in units of their scale
};

// What one head's page is exponentiated from: upper ends, or estimates without bounds. Returns the
// largest of each lane.
template <bool kBounded>
HWY_INLINE Vector MakeLogits(const Batch& batch, uint32_t index, const BatchTerms& terms, size_t h,
                             float softcap, float* HWY_RESTRICT logits) {
  const ScanTag d;
  const PageNumbers& numbers = batch.numbers[index];
  const size_t lane = size_t{index} * kTileHeads + h;
  const auto scale = hn::Set(d, terms.scale[lane]);
  const auto base = hn::Set(d, terms.base[lane]);
  const auto cap = hn::Set(d, softcap);
  auto top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    auto s = hn::MulAdd(hn::Load(d, logits + t), scale, base);
    for (uint32_t j = 0; j < batch.layout.direction_count; ++j) {
      const float along = terms.along[j][lane];
      if (along == 0.0F) continue;
      s = hn::MulAdd(hn::Load(d, numbers.projection[j] + t), hn::Set(d, along), s);
    }
    if constexpr (kBounded) {
      s = hn::MulAdd(hn::Load(d, numbers.radius + t), hn::Set(d, terms.eps_radius[lane]), s);
    }
    if (softcap > 0.0F) {
      s = SoftcapVector(d, s, cap);
      if constexpr (kBounded) s = hn::Add(s, hn::Set(d, terms.margin[lane]));
    }
    hn::Store(s, d, logits + t);
    top = hn::Max(top, s);
  }
  return top;
}

// The powers of two next to e^top.
HWY_INLINE hn::Vec<hn::RebindToSigned<TileTag>> ReferencesOf(hn::Vec<TileTag> top) {
  const TileTag d;
  const hn::RebindToSigned<TileTag> di;
  const auto x = hn::Max(hn::Set(d, kLogitMin), hn::Min(hn::Set(d, -kLogitMin), top));
  const auto exponent =
      hn::Sub(hn::BitCast(di, ExpExponentBits(d, x)), hn::Set(di, kRoundingMagicBits));
  return hn::Max(exponent, hn::Set(di, kReferenceMin));
}

// Exponentiates one head's page. Returns the lanes' sums.
template <bool kBounded>
HWY_INLINE Vector StoreWeights(const float* HWY_RESTRICT logits, int32_t reference,
                               float* HWY_RESTRICT weights) {
  const ScanTag d;
  const auto reference_lanes = hn::Set(CodeTag(), reference);
  auto sum = hn::Zero(d);
  for (size_t t = 0; t < kBlockTokens; t += hn::Lanes(d)) {
    const auto logit = hn::Load(d, logits + t);
    auto weight = kBounded ? ExpScaledWithin(d, logit, reference_lanes)
                           : ExpScaled(d, logit, reference_lanes);
    // The least weight that an exponential which underflowed may stand for.
    if constexpr (kBounded) weight = hn::Max(weight, hn::Set(d, 0x1p-126F));
    hn::StoreU(weight, d, weights + t);
    sum = hn::Add(sum, weight);
  }
  return sum;
}

HWY_INLINE void StoreUnknown(uint32_t head, uint32_t block, ScanWeights* weights) {
  const float unknown = std::numeric_limits<float>::infinity();
  const size_t page = weights->PageIndex(head, block);
  weights->reference[page] = kReferenceMin;
  weights->page_sum[page] = unknown;
  std::fill_n(weights->Page(weights->upper, head, block), kBlockTokens, unknown);
}

// Tokens that the head does not see weigh nothing.
HWY_INLINE void ZeroUnseen(const HeadQueries& queries, uint32_t head, uint32_t block,
                           ScanWeights* weights) {
  const uint32_t begin = block * kBlockTokens;
  const uint32_t visible_begin = queries.visible_begin[head];
  const uint32_t visible_end = queries.visible_end[head];
  if (begin >= visible_begin && begin + kBlockTokens <= visible_end) return;
  float* page = weights->Page(weights->bounded ? weights->upper : weights->estimate, head, block);
  // In four chains: as few additions in a row as elsewhere.
  std::array<float, 4> sums{};
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    if (begin + t < visible_begin || begin + t >= visible_end) page[t] = 0.0F;
    sums[t % 4] += page[t];
  }
  weights->page_sum[weights->PageIndex(head, block)] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// From the factors of one page and tile to weights.
template <bool kBounded, size_t kHeads>
HWY_INLINE void WeighPage(const ScanTask& task, const Batch& batch, uint32_t index, uint32_t head,
                          const CodeFactors<kHeads, kBounded>& factors, const BatchTerms& terms,
                          ScanWeights* weights) {
  const ScanTag d;
  const uint32_t block = batch.block[index];
  HWY_ALIGN float logits[kHeads][kBlockTokens];
  factors.Dot(reinterpret_cast<const uint8_t*>(batch.bytes[index]), batch.next[index],
              batch.layout.dim, logits);
  Vector lanes[kTileHeads];
#pragma GCC unroll 4
  for (size_t h = 0; h < kTileHeads; ++h) lanes[h] = hn::Zero(d);
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) {
    lanes[h] = MakeLogits<kBounded>(batch, index, terms, h, task.shape->logit_softcap, logits[h]);
  }
  HWY_ALIGN int32_t references[kTileHeads];
  hn::Store(ReferencesOf(MaxOfFour(d, lanes)), hn::RebindToSigned<TileTag>(), references);
  std::vector<float>& to = kBounded ? weights->upper : weights->estimate;
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) {
    lanes[h] = StoreWeights<kBounded>(logits[h], references[h],
                                      weights->Page(to, head + static_cast<uint32_t>(h), block));
  }
  HWY_ALIGN float page_sums[kTileHeads];
  hn::Store(SumsOfFour(d, lanes), TileTag(), page_sums);
  for (uint32_t h = 0; h < kHeads; ++h) {
    const size_t page = weights->PageIndex(head + h, block);
    weights->reference[page] = references[h];
    weights->page_sum[page] = page_sums[h];
    if constexpr (kBounded) {
      const size_t lane = size_t{index} * kTileHeads + h;
      weights->lower_share[page] = terms.lower_share[lane];
      weights->estimate_share[page] = terms.estimate_share[lane];
      if (terms.known[lane] == 0) StoreUnknown(head + h, block, weights);
    }
    ZeroUnseen(*task.queries, head + h, block, weights);
  }
}

template <bool kBounded, size_t kHeads>
HWY_INLINE void ScanTile(const ScanTask& task, const Batch& batch, uint32_t head,
                         ScanWeights* weights) {
  CodeFactors<kHeads, kBounded> factors[kBatchPages];
  BatchTerms terms;
  for (uint32_t i = 0; i < batch.count; ++i) {
    PreparePage<kHeads, kBounded>(task, batch, i, head, &factors[i], &terms);
  }
  if constexpr (kBounded) BatchBounds(task, batch, head).Bound(&terms);
  for (uint32_t i = 0; i < batch.count; ++i) {
    WeighPage<kBounded, kHeads>(task, batch, i, head, factors[i], terms, weights);
  }
}

template <bool kBounded>
HWY_INLINE void ScanBatch(const ScanTask& task, Batch* batch, ScanWeights* weights) {
  const SketchLayout& layout = batch->layout;
  for (uint32_t i = 0; i < batch->count; ++i) {
    // Codes come in while these pages' codes are multiplied.
    for (size_t at = layout.lo; at < layout.page_bytes; at += 64) {
      hwy::Prefetch(batch->next[i] + at);
    }
    ReadPage<kBounded>(*task.table, i, batch);
  }
  const uint32_t heads = task.queries->head_count;
  uint32_t head = 0;
  for (; head + kTileHeads <= heads; head += kTileHeads) {
    ScanTile<kBounded, kTileHeads>(task, *batch, head, weights);
  }
  switch (heads - head) {
    case 3:
      return ScanTile<kBounded, 3>(task, *batch, head, weights);
    case 2:
      return ScanTile<kBounded, 2>(task, *batch, head, weights);
    case 1:
      return ScanTile<kBounded, 1>(task, *batch, head, weights);
    default:
      return;
  }
}

template <bool kBounded>
void ScanAll(const ScanTask& task, ScanWeights* weights) {
  const SketchLayout layout(task.shape->layout.head_dim);
  const size_t offset = size_t{task.kv_head} * layout.page_bytes;
  Batch batch(layout);
  const auto bytes_of = [&](size_t word) {
    return task.view->sketches[task.block_begin + word] + offset;
  };
  // Words of the next pages to scan: two batches.
  std::array<size_t, size_t{2} * kBatchPages> words;
  size_t ahead = 0;
  size_t from = 0;
  do {
    for (; ahead < words.size() && from < task.tokens.size(); ++from) {
      if (task.tokens[from] != 0) words[ahead++] = from;
    }
    batch.count = static_cast<uint32_t>(std::min<size_t>(ahead, kBatchPages));
    for (uint32_t i = 0; i < batch.count; ++i) {
      batch.block[i] = task.block_begin + static_cast<uint32_t>(words[i]);
      batch.bytes[i] = bytes_of(words[i]);
      batch.next[i] = i + kBatchPages < ahead ? bytes_of(words[i + kBatchPages]) : batch.bytes[i];
    }
    ScanBatch<kBounded>(task, &batch, weights);
    std::copy(words.begin() + batch.count, words.begin() + ahead, words.begin());
    ahead -= batch.count;
  } while (ahead > 0);
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
  grow(pages, &page_sum);
  if (!with_bounds) return grow(pages * kBlockTokens, &estimate);
  grow(pages, &lower_share);
  grow(pages, &estimate_share);
  grow(pages * kBlockTokens, &upper);
}

void ScanPages(const ScanTask& task, ScanWeights* weights) {
  HWY_DYNAMIC_DISPATCH(ScanPagesTarget)(task, weights);
}

}  // namespace kvservice
#endif  // HWY_ONCE
