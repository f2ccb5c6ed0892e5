#include "attention/cpu/scan_queries.h"

#include <cmath>
#include <cstdint>

#include "attention/scan_terms.h"
#include "attention/sketch.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/scan_queries.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Head dims are multiples of 16.
using DoubleTag = hn::CappedTag<double, 8>;
using FloatTag = hn::Rebind<float, DoubleTag>;
using Doubles = hn::Vec<DoubleTag>;
constexpr size_t kLanes = hn::MaxLanes(DoubleTag());

HWY_INLINE Doubles Widen(const float* x) {
  return hn::PromoteTo(DoubleTag(), hn::LoadU(FloatTag(), x));
}
HWY_INLINE double Sum(Doubles x) { return hn::GetLane(hn::SumOfLanes(DoubleTag(), x)); }

// What the terms of all heads of a group take from its table.
struct Table {
  uint32_t directions = 0;
  const float* w = nullptr;                                   // [directions][head_dim]
  HWY_ALIGN double inverse[kHeadDimMax];                      // 1 / M: products are cheaper
  HWY_ALIGN double along[kSketchDirectionsMax][kHeadDimMax];  // W / M^2
  double norm[kSketchDirectionsMax];                          // ||W_j||
};

HWY_INLINE void FillTable(uint32_t head_dim, const SketchTable& from, Table* table) {
  const DoubleTag d;
  table->directions = SketchDirections(head_dim);
  table->w = from.weights.data();
  Doubles squares[kSketchDirectionsMax];
  for (Doubles& sum : squares) sum = hn::Zero(d);
  for (size_t c = 0; c < head_dim; c += kLanes) {
    const Doubles inverse = hn::Div(hn::Set(d, 1.0), Widen(from.metric.data() + c));
    const Doubles inverse_squared = hn::Mul(inverse, inverse);
    hn::Store(inverse, d, table->inverse + c);
    for (uint32_t j = 0; j < table->directions; ++j) {
      const Doubles w = Widen(table->w + j * head_dim + c);
      hn::Store(hn::Mul(w, inverse_squared), d, table->along[j] + c);
      squares[j] = hn::MulAdd(w, w, squares[j]);
    }
  }
  for (uint32_t j = 0; j < table->directions; ++j) table->norm[j] = std::sqrt(Sum(squares[j]));
}

// What the double arithmetic of the query terms may be off by, many times over.
constexpr double kUp = 1.0 + 0x1p-40;

HWY_INLINE void FillHead(uint32_t head_dim, float scale, const float* q, const Table& table,
                         bool bounded, uint32_t head, ScanQueries* queries) {
  const DoubleTag d;
  const uint32_t directions = table.directions;
  HWY_ALIGN double qs[kHeadDimMax];
  const Doubles scales = hn::Set(d, static_cast<double>(scale));
  Doubles squares = hn::Zero(d);
  Doubles used = hn::Zero(d);
  Doubles along[kSketchDirectionsMax];
  for (Doubles& sum : along) sum = hn::Zero(d);
  for (size_t c = 0; c < head_dim; c += kLanes) {
    const Doubles x = hn::Mul(scales, Widen(q + c));
    hn::Store(x, d, qs + c);
    squares = hn::MulAdd(x, x, squares);
    used = hn::Add(used, hn::IfThenElseZero(hn::Ne(x, hn::Zero(d)), hn::Set(d, 1.0)));
    for (uint32_t j = 0; j < directions; ++j) {
      along[j] = hn::MulAdd(hn::Load(d, table.along[j] + c), x, along[j]);
    }
  }
  double qw[kSketchDirectionsMax];
  for (uint32_t j = 0; j < directions; ++j) {
    qw[j] = Sum(along[j]);
    queries->qw[j][head] = static_cast<float>(qw[j]);
    along[j] = hn::Set(d, qw[j]);
  }
  if (!bounded) return;
  const double norm = std::sqrt(Sum(squares));
  double weight = norm;
  for (uint32_t j = 0; j < directions; ++j) weight += std::fabs(qw[j]) * table.norm[j];
  squares = hn::Zero(d);
  float* to = queries->x.data() + size_t{head} * head_dim;
  for (size_t c = 0; c < head_dim; c += kLanes) {
    Doubles p = hn::Load(d, qs + c);
    for (uint32_t j = 0; j < directions; ++j) {
      p = hn::NegMulAdd(along[j], Widen(table.w + j * head_dim + c), p);
    }
    const Doubles x = hn::Mul(hn::Abs(p), hn::Load(d, table.inverse + c));
    squares = hn::MulAdd(x, x, squares);
    const Doubles up = hn::MulAdd(x, hn::Set(d, 1.0 + 0x1p-22), hn::Set(d, 0x1p-126));
    hn::StoreU(hn::DemoteTo(FloatTag(), up), FloatTag(), to + c);
  }
  queries->used[head] = Sum(used);
  // Covers qs rounded to fp32 (2^-24, or 2^-150 below the normal range) and the sum.
  queries->norm[head] = norm * (1.0 + 0x1p-23) + 0x1p-120;
  queries->weight[head] = weight * kUp;
  queries->x_norm[head] = static_cast<float>(std::sqrt(Sum(squares)));
}

void FillScanQueries(const LayerShape& shape, absl::Span<const float* const> q,
                     const SketchTable& table, bool bounded, ScanQueries* queries) {
  const uint32_t head_dim = shape.layout.head_dim;
  Table terms;
  FillTable(head_dim, table, &terms);
  for (uint32_t head = 0; head < q.size(); ++head) {
    FillHead(head_dim, shape.scale, q[head], terms, bounded, head, queries);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(FillScanQueries);

namespace {

// Tiles of a scan read this many heads at once.
constexpr size_t kPaddedHeads = 4;

}  // namespace

void PrepareScan(const LayerShape& shape, absl::Span<const float* const> q,
                 const SketchTable& table, bool bounded, ScanQueries* queries) {
  const uint32_t head_dim = shape.layout.head_dim;
  const size_t padded = (q.size() + kPaddedHeads - 1) / kPaddedHeads * kPaddedHeads;
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) queries->qw[j].assign(padded, 0.0F);
  if (bounded) {
    queries->x_norm.assign(padded, 0.0F);
    queries->norm.assign(padded, 0.0);
    queries->weight.assign(padded, 0.0);
    queries->used.assign(padded, 0.0);
    queries->x.resize(q.size() * head_dim);
  }
  HWY_DYNAMIC_DISPATCH(FillScanQueries)(shape, q, table, bounded, queries);
}

}  // namespace kvservice
#endif  // HWY_ONCE
