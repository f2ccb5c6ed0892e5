#include "selector/baselines/softmax.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstddef>

namespace kvservice::baselines {
namespace {

// Far below what float sums can see, and far above the subnormal numbers, which are slow.
constexpr float kExponentMin = -60.0F;
// Adding it rounds to an integer, whose low bits are then those of the float.
constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23
// Terms of a sum that are added in float before they go to a double.
constexpr size_t kChunk = 64;

// exp(x) for x <= 0 by 2^n * p(r), |r| <= ln 2 / 2, without a branch or a call, so that loops
// vectorise. ln 2 in two parts (Cody and Waite 1980); p is the Taylor series to degree 6, whose
// rest is below 1.3e-7.
float ExpOfNegative(float x) {
  const float clamped = std::max(x, kExponentMin);
  const float rounded = clamped * 1.44269504F + kRounder;
  const float n = rounded - kRounder;
  const float r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(rounded) << 23));
}

float LargestOf(absl::Span<const float> values) {
  std::array<float, 16> lanes;
  lanes.fill(values[0]);
  size_t i = 0;
  for (; i + lanes.size() <= values.size(); i += lanes.size()) {
    for (size_t lane = 0; lane < lanes.size(); ++lane) {
      lanes[lane] = std::max(lanes[lane], values[i + lane]);
    }
  }
  float largest = *std::max_element(lanes.begin(), lanes.end());
  for (; i < values.size(); ++i) largest = std::max(largest, values[i]);
  return largest;
}

}  // namespace

void Softmax(absl::Span<float> values) {
  if (values.empty()) return;
  const float largest = LargestOf(values);
  double sum = 0.0;
  for (size_t begin = 0; begin < values.size(); begin += kChunk) {
    const size_t count = std::min(kChunk, values.size() - begin);
    float* const chunk = values.data() + begin;
    for (size_t i = 0; i < count; ++i) chunk[i] = ExpOfNegative(chunk[i] - largest);
    float part = 0.0F;
    for (size_t i = 0; i < count; ++i) part += chunk[i];
    sum += part;
  }
  const auto share = static_cast<float>(1.0 / sum);
  for (float& value : values) value *= share;
}

void SoftmaxRows(absl::Span<float> values, uint32_t rows) {
  assert(rows > 0 && values.size() % rows == 0);
  const size_t length = values.size() / rows;
  for (uint32_t row = 0; row < rows; ++row) Softmax(values.subspan(row * length, length));
}

}  // namespace kvservice::baselines
