#include <cmath>

#include "selector/selector.h"

namespace kvservice {

// Positions after which a KV head that was answered densely is tried again.
constexpr uint32_t kDensePositions = 64;

// The smallest set that meets the limit: no top_k, which would only make it larger.
void EditCertified(const Policy& policy, const StepContext& context, Plan* plan) {
  plan->source = Source::kScan;
  plan->lists = context.lists;
  plan->dense_positions = kDensePositions;
  plan->keep = KeepRule();
  if (policy.max_dropped_mass < 1.0F) plan->keep.mass_limit = policy.max_dropped_mass;
  if (std::isfinite(policy.max_output_error)) plan->keep.output_limit = policy.max_output_error;
}

}  // namespace kvservice
