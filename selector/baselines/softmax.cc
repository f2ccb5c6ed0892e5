#include "selector/baselines/softmax.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>

namespace kvservice::baselines {
namespace {

// Far below what sums of floats can see, and far above the subnormal numbers, which are slow.
constexpr float kDistanceMax = 60.0F;
// Adding it rounds to an integer, whose low bits are then those of the float.
constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23
constexpr size_t kLanes = 64;

// Loops here compare integers, not floats: compilers that must heed traps do not vectorise those.

// Orders like the float: negative ones have their bits turned over.
int32_t OrderOf(float value) {
  const auto bits = std::bit_cast<int32_t>(value);
  return bits ^ ((bits >> 31) & std::numeric_limits<int32_t>::max());
}

// exp(-distance), distance >= 0, by 2^n * p(r), |r| <= ln 2 / 2, without a branch or a call. ln 2
// in two parts (Cody and Waite 1980); p is the Taylor series to degree 6, whose rest is below
// 1.3e-7.
float ExpOfMinus(float distance) {
  // Bits of floats that are not negative order like them.
  const int32_t clamped =
      std::min(std::bit_cast<int32_t>(distance), std::bit_cast<int32_t>(kDistanceMax));
  const float x = -std::bit_cast<float>(clamped);
  const float rounded = x * 1.44269504F + kRounder;
  const float n = rounded - kRounder;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
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

float LargestOf(const float* values, size_t count) {
  int32_t largest = std::numeric_limits<int32_t>::min();
  for (size_t i = 0; i < count; ++i) largest = std::max(largest, OrderOf(values[i]));
  return std::bit_cast<float>(largest ^ ((largest >> 31) & std::numeric_limits<int32_t>::max()));
}

}  // namespace

void Softmax(absl::Span<float> values) {
  if (values.empty()) return;
  float* const data = values.data();
  const size_t count = values.size();
  const float largest = LargestOf(data, count);
  for (size_t i = 0; i < count; ++i) data[i] = ExpOfMinus(largest - data[i]);
  std::array<double, kLanes> lanes{};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += data[i + lane];
  }
  double sum = std::accumulate(lanes.begin(), lanes.end(), 0.0);
  for (; i < count; ++i) sum += data[i];
  const auto share = static_cast<float>(1.0 / sum);
  for (i = 0; i < count; ++i) data[i] *= share;
}

void SoftmaxRows(absl::Span<float> values, uint32_t rows) {
  assert(rows > 0 && values.size() % rows == 0);
  const size_t length = values.size() / rows;
  for (uint32_t row = 0; row < rows; ++row) Softmax(values.subspan(row * length, length));
}

}  // namespace kvservice::baselines
