#include "tests/stress/trend.h"

#include <cmath>
#include <cstddef>
#include <numeric>

namespace kvservice::testing {

Trend TrendOf(const std::vector<double>& samples) {
  const auto count = static_cast<double>(samples.size());
  if (samples.size() < 3) return {};
  double mean = 0.0;
  for (const double sample : samples) mean += sample / count;
  double xy = 0.0;
  double xx = 0.0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const double x = static_cast<double>(i) - (count - 1.0) / 2.0;
    xy += x * (samples[i] - mean);
    xx += x * x;
  }
  const double slope = xy / xx;
  double rest = 0.0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const double x = static_cast<double>(i) - (count - 1.0) / 2.0;
    rest += std::pow(samples[i] - mean - slope * x, 2.0);
  }
  return {.growth = slope * count, .noise = 3.0 * std::sqrt(rest / (count - 2.0) / xx) * count};
}

Trend BatchTrendOf(const std::vector<double>& samples) {
  const size_t length = samples.size() / kBatchCount;
  if (length == 0) return {};
  std::vector<double> means;
  auto begin = samples.end() - static_cast<ptrdiff_t>(length * kBatchCount);
  for (; begin != samples.end(); begin += static_cast<ptrdiff_t>(length)) {
    const double sum = std::accumulate(begin, begin + static_cast<ptrdiff_t>(length), 0.0);
    means.push_back(sum / static_cast<double>(length));
  }
  return TrendOf(means);
}

}  // namespace kvservice::testing
