#include "selector/baselines/heavy_channels.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <numeric>

#include "absl/types/span.h"
#include "selector/baselines/choose.h"

namespace kvservice::baselines {
namespace {

constexpr uint32_t kLabelShare = 4;

// Sum of |x_c| over the rows of [rows][channels].
std::vector<double> MagnitudeSums(absl::Span<const float> rows, uint32_t channels) {
  std::vector<double> sums(channels, 0.0);
  for (size_t i = 0; i < rows.size(); ++i) sums[i % channels] += std::abs(rows[i]);
  return sums;
}

}  // namespace

std::vector<uint32_t> HeavyChannels(const Prompt& calibration, uint32_t head, uint32_t r) {
  const uint32_t channels = calibration.shape.head_dim;
  const std::vector<double> keys = MagnitudeSums(calibration.heads[head].keys, channels);
  const std::vector<double> queries = MagnitudeSums(calibration.heads[head].queries, channels);
  std::vector<uint32_t> order(channels);
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return keys[a] * queries[a] > keys[b] * queries[b];
  });
  order.resize(r);
  std::sort(order.begin(), order.end());
  return order;
}

LabelIndex<FourBitLabels> HeavyChannelLabels(const BaselineContext& context) {
  const uint32_t r = std::max(1U, context.prompt->shape.head_dim / kLabelShare);
  std::vector<std::vector<uint32_t>> channels(context.prompt->heads.size());
  ForEachIndex(ChoosingHeads(*context.prompt), context.threads, [&](uint32_t head) {
    channels[head] = HeavyChannels(*context.calibration, head, r);
  });
  Projection projection = {
      .channels = r,
      .apply = [channels = std::move(channels)](uint32_t head, absl::Span<const float> vector,
                                                absl::Span<float> label) {
        std::transform(channels[head].begin(), channels[head].end(), label.begin(),
                       [vector](uint32_t channel) { return vector[channel]; });
      }};
  return LabelIndex<FourBitLabels>(*context.prompt, std::move(projection), context.threads);
}

}  // namespace kvservice::baselines
