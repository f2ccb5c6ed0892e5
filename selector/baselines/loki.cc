// Loki (Singhania et al., "Loki: Low-rank Keys for Efficient Sparse Attention", NeurIPS 2024): keys
// lie near a subspace that another text already shows. Keys and queries are turned to the principal
// components of that text's rotated keys, and the first quarter of them is scanned with every step.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/components.h"
#include "selector/baselines/label_scan_index.h"
#include "selector/baselines/label_stores.h"

namespace kvservice::baselines {
namespace {

// 32 of 128 components, the middle one of the settings in its code.
constexpr uint32_t kLabelShare = 4;
// Keys of the calibration that the components are computed from, evenly spaced: 8 for each of the
// 256 channels of the widest head.
constexpr uint32_t kCalibrationKeysMax = 2048;

std::vector<float> ComponentsOf(const Prompt& calibration, uint32_t head, uint32_t r) {
  const uint32_t channels = calibration.shape.head_dim;
  const uint32_t count = std::min(calibration.length, kCalibrationKeysMax);
  std::vector<float> keys;
  keys.reserve(size_t{count} * channels);
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t token = uint64_t{i} * calibration.length / count;
    const auto key = calibration.heads[head].keys.subspan(token * channels, channels);
    keys.insert(keys.end(), key.begin(), key.end());
  }
  return PrincipalComponents(keys, channels, r);
}

}  // namespace

std::unique_ptr<const PromptIndex> NewLoki(const BaselineContext& context) {
  const uint32_t channels = context.prompt->shape.head_dim;
  const uint32_t r = std::max(1U, channels / kLabelShare);
  std::vector<std::vector<float>> components(context.prompt->heads.size());
  ForEachIndex(ChoosingHeads(*context.prompt), context.threads, [&](uint32_t head) {
    components[head] = ComponentsOf(*context.calibration, head, r);
  });
  Projection projection = {
      .channels = r,
      .apply =
          [components = std::move(components)](uint32_t head, absl::Span<const float> vector,
                                               absl::Span<float> label) {
            const float* component = components[head].data();
            for (float& value : label) {
              value = std::inner_product(vector.begin(), vector.end(), component, 0.0F);
              component += vector.size();
            }
          },
      .flops = 2.0 * channels * r};
  return std::make_unique<LabelScanIndex<HalfLabels>>(
      LabelIndex<HalfLabels>(*context.prompt, std::move(projection), context.threads));
}

}  // namespace kvservice::baselines
