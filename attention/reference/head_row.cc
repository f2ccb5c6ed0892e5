#include "attention/reference/head_row.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "attention/float16.h"

namespace kvservice::reference {
namespace {

// First token that a query at `position` sees.
uint32_t WindowBegin(uint32_t sliding_window, uint32_t position) {
  if (sliding_window == 0 || position + 1 <= sliding_window) return 0;
  return position + 1 - sliding_window;
}

LogitRange Capped(float cap, double low, double nearest, double high) {
  return {SoftcapDown(cap, low), Softcap(cap, nearest), SoftcapUp(cap, high)};
}

}  // namespace

HeadRow::HeadRow(const LayerShape& shape, const AttendRow& row, uint32_t kv_head)
    : shape_(shape),
      row_(row),
      kv_head_(kv_head),
      sketch_layout_(shape.layout.head_dim),
      begin_(WindowBegin(shape.sliding_window, row.position)) {
  assert(row.position + row.query_count == row.view.length);
  SetPlaces();
  const size_t token_count = end() - begin_;
  exact_.resize(head_count() * token_count);
  pages_.resize(static_cast<size_t>(head_count()) * BlockCount(end()));
  scanned_.resize(token_count);
}

void HeadRow::SetPlaces() {
  const Plan& plan = row_.plan;
  // The query tokens' own keys are never sketched away from them.
  const uint32_t local_begin = std::min(plan.local_begin, row_.position);
  covered_end_ = local_begin;
  places_.resize(end() - begin_);
  for (uint32_t token = begin_; token < end(); ++token) {
    const std::byte* sketch = SketchBytes(token / kBlockTokens);
    const bool outer = token < plan.sink_end || token >= local_begin;
    if (sketch == nullptr && !outer) covered_end_ = std::min(covered_end_, token);
    const bool exact =
        sketch == nullptr ||
        ((SketchPage(sketch_layout_, sketch).exact >> (token % kBlockTokens)) & 1) != 0;
    Place& place = places_[token - begin_];
    if (outer || exact) {
      place = Place::kAlways;
    } else {
      place = token < plan.visible_begin ? Place::kHidden : Place::kMiddle;
    }
  }
}

const std::byte* HeadRow::SketchBytes(uint32_t block) const {
  const std::byte* sketch = row_.view.sketches[block];
  return sketch == nullptr ? nullptr : sketch + kv_head_ * sketch_layout_.page_bytes;
}

size_t HeadRow::Index(uint32_t head, uint32_t token) const {
  return static_cast<size_t>(head) * (end() - begin_) + (token - begin_);
}

size_t HeadRow::OutputIndex(uint32_t head) const {
  const uint32_t group = shape_.layout.group_size();
  return static_cast<size_t>(head / group) * shape_.layout.query_head_count + kv_head_ * group +
         head % group;
}

bool HeadRow::Sees(uint32_t head, uint32_t token) const {
  const uint32_t position = row_.position + head / shape_.layout.group_size();
  return token <= position && token >= WindowBegin(shape_.sliding_window, position);
}

std::vector<uint32_t> HeadRow::TokensAt(Place place) const {
  std::vector<uint32_t> tokens;
  for (uint32_t token = begin_; token < end(); ++token) {
    if (PlaceOf(token) == place) tokens.push_back(token);
  }
  return tokens;
}

LogitRange HeadRow::Exact(uint32_t head, uint32_t token) {
  std::optional<LogitRange>& range = exact_[Index(head, token)];
  if (range.has_value()) return *range;
  const uint32_t head_dim = shape_.layout.head_dim;
  const float* q = row_.q + OutputIndex(head) * head_dim;
  const std::byte* k = row_.view.Row(shape_.layout, kv_head_, token);
  double sum = 0.0;
  double absolute = 0.0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    // The product of scale and q is exact; that with k and the sum round.
    const double term = static_cast<double>(shape_.scale) * static_cast<double>(q[c]) *
                        static_cast<double>(LoadElement(shape_.layout.dtype, k, c));
    sum += term;
    absolute += std::fabs(term);
  }
  // Twice (d + 1) roundings of u = 2^-53 each, and room for those of this bound.
  const double error = (head_dim + 4) * 0x1p-52 * absolute;
  range = Capped(shape_.logit_softcap, sum - error, sum, sum + error);
  return *range;
}

const PageTerms<double>& HeadRow::TermsOf(uint32_t head, uint32_t block) {
  const SketchTable& table = row_.tables[kv_head_];
  const uint32_t head_dim = shape_.layout.head_dim;
  if (query_terms_.empty()) {
    for (uint32_t h = 0; h < head_count(); ++h) {
      query_terms_.push_back(MakeQueryTerms<double>(head_dim, shape_.scale,
                                                    row_.q + OutputIndex(h) * head_dim, table));
    }
  }
  std::optional<PageTerms<double>>& terms = pages_[head * size_t{BlockCount(end())} + block];
  if (!terms.has_value()) {
    const SketchPage page(sketch_layout_, SketchBytes(block));
    terms = MakePageTerms(sketch_layout_, page, table, query_terms_[head]);
  }
  return *terms;
}

LogitRange HeadRow::Estimate(uint32_t head, uint32_t token) {
  assert(PlaceOf(token) != Place::kAlways);
  const uint32_t block = token / kBlockTokens;
  const PageTerms<double>& terms = TermsOf(head, block);
  const SketchPage page(sketch_layout_, SketchBytes(block));
  const double logit = EstimateLogit(sketch_layout_, page, token % kBlockTokens, terms);
  const double error = LogitError(page, token % kBlockTokens, terms);
  if (!scanned_[token - begin_]) {
    scanned_[token - begin_] = true;
    ++scanned_count_;
  }
  return Capped(shape_.logit_softcap, logit - error, logit, logit + error);
}

float HeadRow::ValueBound(uint32_t token) const {
  const SketchPage page(sketch_layout_, SketchBytes(token / kBlockTokens));
  // The product of two floats is exact in double.
  return RoundUpToFloat(static_cast<double>(page.vmax) *
                        static_cast<double>(kRadiusScale[page.vn[token % kBlockTokens]]));
}

void HeadRow::AddValue(uint32_t token, double weight, double* out) const {
  const std::byte* v = row_.view.Row(shape_.layout, kv_head_, token) + shape_.layout.vector_bytes();
  for (uint32_t c = 0; c < shape_.layout.head_dim; ++c) {
    out[c] += weight * static_cast<double>(LoadElement(shape_.layout.dtype, v, c));
  }
}

}  // namespace kvservice::reference
