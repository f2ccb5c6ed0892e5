#include "selector/selector.h"

namespace kvservice {

void EditScan(const Policy& policy, const StepContext& context, Plan* plan) {
  plan->source = Source::kScan;
  const Budget& budget = BudgetOf(policy, context);
  plan->keep = KeepRule{.top_k = budget.top_k, .mass_limit = budget.mass};
  // What is chosen is stored there, for deeper layers (ETF) of the same step.
  plan->lists = context.lists;
}

}  // namespace kvservice
