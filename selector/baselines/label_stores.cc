#include "selector/baselines/label_stores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/float16.h"

namespace kvservice::baselines {
namespace {

constexpr float kCodeMax = 15.0F;  // 4 bits

}  // namespace

void FourBitLabels::Reserve(uint32_t tokens) {
  codes_.Reserve(tokens);
  low_.reserve(tokens);
  step_.reserve(tokens);
}

void FourBitLabels::Append(absl::Span<const float> label) {
  const auto ends = std::minmax_element(label.begin(), label.end());
  const float low = *ends.first;
  const float step = (*ends.second - low) / kCodeMax;
  std::vector<uint8_t> codes(label.size(), 0);
  if (step > 0.0F) {
    std::transform(label.begin(), label.end(), codes.begin(), [&](float value) {
      return static_cast<uint8_t>(std::clamp(std::round((value - low) / step), 0.0F, kCodeMax));
    });
  }
  codes_.Append(codes);
  low_.push_back(low);
  step_.push_back(step);
}

// q . (low + step * codes) = low * (sum of q) + step * (q . codes).
void FourBitLabels::Dot(absl::Span<const float> q, uint32_t heads, float* dots,
                        size_t stride) const {
  codes_.Dot(q, heads, dots, stride);
  const uint32_t channels = codes_.channels();
  for (uint32_t head = 0; head < heads; ++head) {
    const auto begin = q.begin() + size_t{head} * channels;
    const float sum = std::accumulate(begin, begin + channels, 0.0F);
    float* const row = dots + head * stride;
    for (uint32_t t = 0; t < size(); ++t) row[t] = low_[t] * sum + step_[t] * row[t];
  }
}

void HalfLabels::Append(absl::Span<const float> label) {
  std::vector<float> rounded(label.size());
  std::transform(label.begin(), label.end(), rounded.begin(),
                 [](float value) { return FloatFromFloat16(Float16FromFloat(value)); });
  values_.Append(rounded);
}

}  // namespace kvservice::baselines
