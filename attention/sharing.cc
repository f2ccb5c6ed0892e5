#include "attention/sharing.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>

#include "attention/float16.h"
#include "attention/lanes.h"
#include "attention/log_mass.h"
#include "attention/sketch.h"

namespace kvservice {
namespace {

// See the header; two and three serve about equally well (docs/decisions.md).
constexpr float kDeviations = 2.0F;

struct HeavyTokens {
  std::vector<uint32_t> positions;
  std::vector<float> shares;  // [positions][group]; zero where not heavy
};

HeavyTokens FindHeavy(const SharingTask& task, uint32_t group) {
  HeavyTokens heavy;
  const size_t count = task.read.size();
  for (size_t i = 0; i < count; ++i) {
    bool known = false;
    for (uint32_t head = 0; head < group; ++head) {
      const double share = std::exp(task.read_logits[head * count + i] - task.log_read[head]);
      if (share < kHeavyShare) continue;
      if (!known) {
        heavy.positions.push_back(task.read[i]);
        heavy.shares.resize(heavy.shares.size() + group, 0.0F);
      }
      known = true;
      heavy.shares[(heavy.positions.size() - 1) * group + head] = static_cast<float>(share);
    }
  }
  return heavy;
}

}  // namespace

double LogAdd(double a, double b) {
  const double top = std::max(a, b);
  if (!(top > kLogZero)) return top;
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}

void SharingTerms::Leave(uint32_t head, double log_ratio) {
  if (empty()) return;
  log_odds[head] = static_cast<float>(LogAdd(static_cast<double>(log_odds[head]), log_ratio));
}

std::vector<size_t> SpreadSample(size_t page_count) {
  const size_t count = std::min<size_t>(page_count, kSpreadPagesMax);
  std::vector<size_t> sample(count);
  for (size_t i = 0; i < count; ++i) sample[i] = i * page_count / count;
  return sample;
}

KeySpread SpreadOfKeys(uint32_t head_dim, absl::Span<const std::byte* const> pages) {
  KeySpread spread;
  spread.mean.assign(head_dim, 0.0);
  spread.variance.assign(head_dim, 0.0);
  if (pages.empty()) return spread;
  const SketchLayout layout(head_dim);
  const std::vector<size_t> sample = SpreadSample(pages.size());
  std::vector<double> squares(head_dim, 0.0);
  for (const size_t index : sample) {
    const SketchPage page(layout, pages[index]);
    for (uint32_t c = 0; c < head_dim; ++c) {
      const auto step = static_cast<double>(FloatFromFloat16(page.step[c]));
      const double centre = static_cast<double>(page.lo[c]) + kBoxSteps / 2 * step;
      const double width = kBoxSteps * step;
      spread.mean[c] += centre;
      squares[c] += centre * centre;
      spread.variance[c] += kVarianceOfWidth * width * width;
    }
  }
  const auto number = static_cast<double>(sample.size());
  for (uint32_t c = 0; c < head_dim; ++c) {
    spread.mean[c] /= number;
    const double between = squares[c] / number - spread.mean[c] * spread.mean[c];
    spread.variance[c] = std::max(0.0, between) + spread.variance[c] / number;
  }
  return spread;
}

SharingTerms MakeSharingTerms(const SharingTask& task, ReadKeys read_keys) {
  const KvLayout& layout = task.shape->layout;
  const uint32_t head_dim = layout.head_dim;
  const uint32_t group = layout.group_size();
  assert(task.queries.size() == size_t{group} * head_dim);
  assert(task.read_logits.size() == group * task.read.size() && task.log_left.size() == group);
  SharingTerms terms;
  terms.queries.reserve(task.queries.size());
  for (const float q : task.queries) terms.queries.push_back(task.shape->scale * q);
  terms.variance.assign(task.spread->variance.begin(), task.spread->variance.end());
  for (uint32_t head = 0; head < group; ++head) {
    terms.log_odds.push_back(static_cast<float>(task.log_left[head] - task.log_read[head]));
  }
  terms.shift.resize(size_t{group} * head_dim);
  const std::vector<float> mean(task.spread->mean.begin(), task.spread->mean.end());
  std::vector<float> from_mean(head_dim);
  const HeavyTokens heavy = FindHeavy(task, group);
  const std::vector<const std::byte*> keys = read_keys(heavy.positions);
  for (size_t i = 0; i < keys.size(); ++i) {
    for (uint32_t c = 0; c < head_dim; ++c) {
      from_mean[c] = mean[c] - LoadElement(layout.dtype, keys[i], c);
    }
    for (uint32_t head = 0; head < group; ++head) {
      const float share = heavy.shares[i * group + head];
      if (share == 0.0F) continue;
      float* shift = &terms.shift[size_t{head} * head_dim];
      for (uint32_t c = 0; c < head_dim; ++c) shift[c] += share * from_mean[c];
    }
  }
  return terms;
}

SharingQuery::SharingQuery(const LayerShape& shape, uint32_t position,
                           absl::Span<const float> queries)
    : head_dim_(shape.layout.head_dim), half_(shape.rotary_style == RotaryStyle::kHalf) {
  queries_.resize(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) queries_[i] = shape.scale * queries[i];
  if (shape.rotary_style == RotaryStyle::kNone) return;
  pair_count_ = static_cast<uint32_t>(shape.inverse_frequencies.size());
  for (const float frequency : shape.inverse_frequencies) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequency);
    cosine_.push_back(static_cast<float>(std::cos(angle)));
    sine_.push_back(static_cast<float>(std::sin(angle)));
  }
}

float SharingQuery::EstimateDroppedMass(const SharingTerms& terms) const {
  constexpr float kNothingKnown = 1.0F;
  if (terms.empty()) return kNothingKnown;
  assert(terms.queries.size() == queries_.size());
  std::array<float, kHeadDimMax> dq;
  float largest = 0.0F;
  for (size_t head = 0; head < terms.log_odds.size(); ++head) {
    const size_t first = head * head_dim_;
    for (uint32_t c = 0; c < head_dim_; ++c) dq[c] = queries_[first + c] - terms.queries[first + c];
    for (uint32_t pair = 0; pair < pair_count_; ++pair) {
      float& a = dq[half_ ? pair : 2 * pair];
      float& b = dq[half_ ? pair + pair_count_ : 2 * pair + 1];
      const float turned = a * cosine_[pair] - b * sine_[pair];
      b = b * cosine_[pair] + a * sine_[pair];
      a = turned;
    }
    const float mean = Dot(dq.data(), &terms.shift[first], head_dim_);
    for (uint32_t c = 0; c < head_dim_; ++c) dq[c] *= dq[c];
    const float squares = Dot(dq.data(), terms.variance.data(), head_dim_);
    const float odds = std::exp(terms.log_odds[head] + mean + kDeviations * std::sqrt(squares));
    if (!std::isfinite(odds)) return kNothingKnown;
    largest = std::max(largest, odds / (1.0F + odds));
  }
  return largest;
}

}  // namespace kvservice
