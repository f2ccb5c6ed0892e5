#include "selector/selector.h"

namespace kvservice {

// The smallest set that meets the limit: no top_k, which would only make it larger.
void EditCertified(const Policy& policy, const StepContext& /*context*/, Plan* plan) {
  plan->source = Source::kScan;
  plan->keep = KeepRule{.mass_limit = policy.max_dropped_mass};
}

}  // namespace kvservice
