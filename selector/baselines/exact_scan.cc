#include "selector/baselines/exact_scan.h"

#include "absl/types/span.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/softmax.h"

namespace kvservice::baselines {

Cost ExactScanCost(const ModelShape& shape, uint32_t length) {
  const double channels = static_cast<double>(length) * shape.head_dim;
  return {.heads_scanned = shape.kv_head_count,
          .bytes = 2.0 * channels * shape.kv_head_count,
          .flops = 2.0 * channels * shape.query_head_count};
}

Cost KeepByExactScan(const Step& step, const ModelShape& shape, const TokenBudget& budget,
                     std::vector<std::vector<uint32_t>>* positions) {
  std::vector<float> probabilities(step.logits.begin(), step.logits.end());
  SoftmaxRows(absl::MakeSpan(probabilities), shape.query_head_count);
  const size_t numbers = size_t{shape.group()} * step.length;
  for (uint32_t kv_head = 0; kv_head < shape.kv_head_count; ++kv_head) {
    const auto own = absl::MakeConstSpan(probabilities).subspan(kv_head * numbers, numbers);
    KeepForGroup(own, shape.group(), step.length, budget, &(*positions)[kv_head]);
  }
  return ExactScanCost(shape, step.length);
}

}  // namespace kvservice::baselines
