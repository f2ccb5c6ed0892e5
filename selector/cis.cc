#include "selector/selector.h"

namespace kvservice {

// The scan stays in the plan as what happens when no anchor is similar enough; its top_k makes
// lists large enough to be reused.
void EditCis(const Policy& policy, const StepContext& context, Plan* plan) {
  EditScan(policy, context, plan);
  plan->keep.dilate_strongest = policy.cis.dilate_strongest;
  plan->keep.dilate_radius = policy.cis.dilate_radius;
  if (context.lists == nullptr) return;
  plan->source = Source::kReuse;
  plan->min_cosine = policy.cis.min_cosine;
  plan->reuse_mass_limit = policy.cis.max_dropped_mass_estimate;
  if (context.ruling == nullptr) return;
  plan->min_cosine = context.ruling->min_cosine.value_or(policy.cis.min_cosine);
  plan->min_cosines = context.ruling->kv_head_min_cosines;
}

}  // namespace kvservice
