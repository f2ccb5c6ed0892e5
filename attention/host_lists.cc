#include "attention/host_lists.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <utility>

#include "attention/float16.h"
#include "attention/lanes.h"
#include "attention/log_mass.h"

namespace kvservice {
namespace {

// At least the norm of a vector of a finite key.
float NormUpper(DType dtype, const std::byte* vector, uint32_t head_dim) {
  double squares = 0.0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double x = LoadElement(dtype, vector, c);
    squares += x * x;
  }
  // Covers the roundings of the sum and the root: 2^-53 each.
  return RoundUpToFloat(std::sqrt(squares) * (1.0 + 0x1p-40));
}

// Scales every query of a group to norm 1; one of norm zero (or not finite) becomes zero.
// norms: [group], or nullptr.
void Normalize(absl::Span<const float> queries, uint32_t head_dim, float* out,
               float* norms = nullptr) {
  for (size_t begin = 0; begin < queries.size(); begin += head_dim) {
    const double norm = std::sqrt(SumOfSquares(&queries[begin], head_dim));
    const bool usable = norm > 0.0 && std::isfinite(norm);
    if (norms != nullptr) norms[begin / head_dim] = usable ? static_cast<float>(norm) : 0.0F;
    const double inverse = 1.0 / norm;
    for (uint32_t c = 0; c < head_dim; ++c) {
      out[begin + c] = static_cast<float>(queries[begin + c] * inverse);
    }
    if (!usable) std::fill_n(out + begin, head_dim, 0.0F);
  }
}

// Turns every pair of rotated channels by `turns` angles of its own frequency.
void TurnQueries(const LayerShape& shape, double turns, const float* q, float* out) {
  const uint32_t head_dim = shape.layout.head_dim;
  const size_t float_count = static_cast<size_t>(shape.layout.query_head_count) * head_dim;
  if (out != q) std::copy_n(q, float_count, out);
  if (shape.rotary_style == RotaryStyle::kNone) return;
  const auto pair_count = static_cast<uint32_t>(shape.inverse_frequencies.size());
  assert(2 * pair_count <= head_dim);
  for (uint32_t pair = 0; pair < pair_count; ++pair) {
    const double angle = turns * static_cast<double>(shape.inverse_frequencies[pair]);
    const double cosine = std::cos(angle);
    const double sine = std::sin(angle);
    const bool half = shape.rotary_style == RotaryStyle::kHalf;
    const uint32_t first = half ? pair : 2 * pair;
    const uint32_t second = half ? pair + pair_count : 2 * pair + 1;
    for (uint32_t head = 0; head < shape.layout.query_head_count; ++head) {
      float* x = out + static_cast<size_t>(head) * head_dim;
      const double a = x[first];
      const double b = x[second];
      x[first] = static_cast<float>(a * cosine - b * sine);
      x[second] = static_cast<float>(b * cosine + a * sine);
    }
  }
}

void DropFrom(uint32_t length, std::vector<uint32_t>* tokens) {
  tokens->erase(std::lower_bound(tokens->begin(), tokens->end(), length), tokens->end());
}

}  // namespace

HostLists::HostLists(const KvLayout& layout, uint32_t anchors_max)
    : layout_(layout), anchors_max_(anchors_max), heads_(layout.kv_head_count) {}

std::unique_ptr<TokenLists> HostLists::Copy() const {
  auto copy = std::make_unique<HostLists>(layout_, anchors_max_);
  copy->heads_ = heads_;
  return copy;
}

void HostLists::Truncate(uint32_t length) {
  for (Head& head : heads_) {
    DropFrom(length, &head.selection);
    head.key_norm_end = std::min(head.key_norm_end, length);
    for (Anchor& anchor : head.anchors) {
      DropFrom(length, &anchor.tokens);
      // What was read and left included tokens that are gone.
      if (length < anchor.covered_end) anchor.sharing = {};
      anchor.covered_end = std::min(anchor.covered_end, length);
    }
  }
}

size_t HostLists::bytes() const {
  size_t bytes = sizeof(*this) + heads_.capacity() * sizeof(Head);
  for (const Head& head : heads_) {
    bytes += (head.queries.capacity() + head.query_norms.capacity()) * sizeof(float);
    bytes += head.selection.capacity() * sizeof(uint32_t);
    bytes += head.anchors.capacity() * sizeof(Anchor);
    for (const Anchor& anchor : head.anchors) {
      bytes += anchor.tokens.capacity() * sizeof(uint32_t) + anchor.sharing.bytes();
    }
  }
  return bytes;
}

HostLists::Match HostLists::FindMostSimilar(uint32_t kv_head, absl::Span<const float> queries,
                                            bool estimable) const {
  const Head& head = heads_[kv_head];
  assert(queries.size() == query_floats());
  std::array<float, size_t{kGroupMax} * kHeadDimMax> unit;
  Normalize(queries, layout_.head_dim, unit.data());
  Match best;
  uint64_t best_tick = 0;
  for (uint32_t index = 0; index < head.anchors.size(); ++index) {
    if (estimable && head.anchors[index].sharing.empty()) continue;
    const float* anchor = &head.queries[index * query_floats()];
    // The smallest cosine counts, so one that is already beaten settles it: most anchors cost one
    // dot product.
    float smallest = 2.0F;
    for (size_t begin = 0; begin < query_floats() && smallest >= best.similarity;
         begin += layout_.head_dim) {
      smallest = std::min(smallest, Dot(&unit[begin], anchor + begin, layout_.head_dim));
    }
    const uint64_t tick = head.anchors[index].used_tick;
    if (smallest < best.similarity || (smallest == best.similarity && tick < best_tick)) continue;
    best = {static_cast<int32_t>(index), smallest};
    best_tick = tick;
  }
  return best;
}

ReusableAnchor FindReusable(const HostLists& lists, const LayerShape& shape, const Plan& plan,
                            uint32_t kv_head, uint32_t position, absl::Span<const float> queries) {
  const bool estimates = plan.reuse_mass_limit > 0.0F;
  const HostLists::Match match = lists.FindMostSimilar(kv_head, queries, estimates);
  ReusableAnchor found{.similarity = match.similarity};
  if (match.anchor < 0 || !(match.similarity >= MinCosine(plan, kv_head))) return found;
  if (estimates) {
    const HostLists::Anchor& anchor = lists.anchor(kv_head, static_cast<uint32_t>(match.anchor));
    found.estimate = SharingQuery(shape, position, queries).EstimateDroppedMass(anchor.sharing);
    if (!(found.estimate <= plan.reuse_mass_limit)) return found;
  }
  found.anchor = match.anchor;
  return found;
}

void HostLists::Insert(uint32_t kv_head, absl::Span<const float> queries,
                       std::vector<uint32_t> tokens, uint32_t covered_end, SharingTerms sharing) {
  if (anchors_max_ == 0) return;
  Head& head = heads_[kv_head];
  auto index = static_cast<uint32_t>(head.anchors.size());
  if (index < anchors_max_) {
    head.anchors.emplace_back();
    head.queries.resize(head.anchors.size() * query_floats());
    head.query_norms.resize(head.anchors.size() * layout_.group_size());
  } else {
    const auto oldest = std::min_element(
        head.anchors.begin(), head.anchors.end(),
        [](const Anchor& a, const Anchor& b) { return a.used_tick < b.used_tick; });
    index = static_cast<uint32_t>(oldest - head.anchors.begin());
  }
  StoreQueries(kv_head, index, queries);
  Complete(kv_head, index, std::move(tokens), covered_end);
  head.anchors[index].sharing = std::move(sharing);
  Touch(kv_head, index);
}

void HostLists::StoreQueries(uint32_t kv_head, uint32_t index, absl::Span<const float> queries) {
  assert(queries.size() == query_floats());
  Head& head = heads_[kv_head];
  Normalize(queries, layout_.head_dim, &head.queries[index * query_floats()],
            &head.query_norms[size_t{index} * layout_.group_size()]);
}

float HostLists::QueryDistance(uint32_t kv_head, uint32_t index,
                               absl::Span<const float> queries) const {
  assert(queries.size() == query_floats());
  const Head& head = heads_[kv_head];
  double largest = 0.0;
  for (uint32_t g = 0; g < layout_.group_size(); ++g) {
    const double norm = head.query_norms[size_t{index} * layout_.group_size() + g];
    const float* unit = &head.queries[index * query_floats() + size_t{g} * layout_.head_dim];
    const float* query = &queries[size_t{g} * layout_.head_dim];
    largest = std::max(largest, SumOfSquaresApart(query, norm, unit, layout_.head_dim));
  }
  return static_cast<float>(std::sqrt(largest));
}

float HostLists::KeyNormMax(uint32_t kv_head, uint32_t length, NormMax norm_max) {
  Head& head = heads_[kv_head];
  if (head.key_norm_end < length) {
    head.key_norm_max = std::max(head.key_norm_max, norm_max(head.key_norm_end, length));
    head.key_norm_end = length;
  }
  return head.key_norm_max;
}

void HostLists::Touch(uint32_t kv_head, uint32_t index) {
  Head& head = heads_[kv_head];
  head.anchors[index].used_tick = ++head.tick;
}

void HostLists::Complete(uint32_t kv_head, uint32_t index, std::vector<uint32_t> tokens,
                         uint32_t covered_end) {
  assert(std::is_sorted(tokens.begin(), tokens.end()));
  Anchor& anchor = heads_[kv_head].anchors[index];
  anchor.tokens = std::move(tokens);
  anchor.covered_end = covered_end;
}

void HostLists::SetSelection(uint32_t kv_head, absl::Span<const uint32_t> tokens) {
  assert(std::is_sorted(tokens.begin(), tokens.end()));
  heads_[kv_head].selection.assign(tokens.begin(), tokens.end());
  heads_[kv_head].has_selection = true;
}

void HostLists::ClearSelection(uint32_t kv_head) {
  heads_[kv_head].selection.clear();
  heads_[kv_head].has_selection = false;
}

float KeyNormMax(const KvLayout& layout, const KvView& view, uint32_t kv_head, uint32_t begin,
                 uint32_t end) {
  float largest = 0.0F;
  for (uint32_t position = begin; position < end; ++position) {
    const std::byte* key = view.Row(layout, kv_head, position);
    largest = std::max(largest, NormUpper(layout.dtype, key, layout.head_dim));
  }
  return largest;
}

void UnrotateQueries(const LayerShape& shape, uint32_t position, const float* q, float* out) {
  TurnQueries(shape, -static_cast<double>(position), q, out);
}

void RotateQueries(const LayerShape& shape, uint32_t position, const float* q, float* out) {
  TurnQueries(shape, position, q, out);
}

}  // namespace kvservice
