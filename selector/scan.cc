#include "selector/selector.h"

namespace kvservice {

void EditScan(const Policy& policy, const StepContext& context, Plan* plan) {
  plan->source = Source::kScan;
  plan->keep = KeepRule{.top_k = policy.budget.top_k};
  // What is chosen is stored there, for deeper layers (ETF) of the same step.
  plan->lists = context.lists;
}

}  // namespace kvservice
