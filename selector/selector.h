// Selectors write plans. They are pure host code without access to keys: that is what pre-hoc means
// here. Every pre-hoc method is an edit of a plan that already says something valid (dense), so
// methods compose by applying their edits in a row (CPE).
//
// Adding one: write <name>.cc with an `Edit<Name>` function, declare it here and add one line to
// MakePlan. Pure functions; any thread.

#ifndef KVSERVICE_SELECTOR_SELECTOR_H_
#define KVSERVICE_SELECTOR_SELECTOR_H_

#include <cstdint>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/plan.h"
#include "selector/policy.h"

namespace kvservice {

// Where in the model and the sequence a step is.
struct StepContext {
  uint32_t layer = 0;
  uint32_t layer_count = 0;
  // Tokens the row attends to, its own query tokens included.
  uint32_t attended_length = 0;
  uint32_t query_count = 1;
  // Device::certified_from_tokens.
  uint32_t certified_from_tokens = 0;
  // The layer's sliding window, 0 = none. Windowed layers are dense over their window.
  uint32_t sliding_window = 0;
  // Lists of this layer (nullptr = nothing is remembered: CIS then scans), and of the nearest
  // shallower layer of the same step for ETF (nullptr = there is none: nothing is frozen).
  TokenLists* lists = nullptr;
  const TokenLists* shallower_lists = nullptr;
  // kGiven: see Plan::given.
  absl::Span<const uint32_t> given;
  absl::Span<const uint32_t> given_offsets;
  // The policy's entry that rules the layer, nullptr = none. MakePlan looks it up; edits read it.
  const LayerOverride* ruling = nullptr;
};

struct PlannedStep {
  Plan plan;
  // The selector that was used after `auto`, layer overrides and length rules.
  SelectorKind selector = SelectorKind::kDense;
  // The sequence's lists of this layer must be dropped before the call (CIS in the paper's form, at
  // a block's first step).
  bool drop_lists = false;
  // What the theory assumes about the plan's hidden and frozen tokens (selector/assumed.h), where
  // it has such and the layer was calibrated; negative = nothing.
  double assumed_psaw_dropped_mass = -1.0;
  double assumed_etf_excess_mass = -1.0;
};

// The plan of one row. `policy` is valid (ValidatePolicy) and outlives the plan, which borrows its
// cosines.
PlannedStep MakePlan(const Policy& policy, const StepContext& context);

// What MakePlan will choose, for callers that prepare lists; reads neither lists nor given
// positions.
SelectorKind ResolveSelector(const Policy& policy, const StepContext& context);
// The budget that holds in the step's layer.
inline const Budget& BudgetOf(const Policy& policy, const StepContext& context) {
  const bool own = context.ruling != nullptr && context.ruling->budget.has_value();
  return own ? *context.ruling->budget : policy.budget;
}
// The selector remembers choices in StepContext::lists.
bool UsesLists(SelectorKind selector);

// The edits. Each takes a plan that the previous ones wrote.
void EditGiven(const Policy& policy, const StepContext& context, Plan* plan);
void EditScan(const Policy& policy, const StepContext& context, Plan* plan);
void EditCis(const Policy& policy, const StepContext& context, Plan* plan);
void EditPsaw(const Policy& policy, const StepContext& context, Plan* plan);
void EditEtf(const Policy& policy, const StepContext& context, Plan* plan);
void EditCertified(const Policy& policy, const StepContext& context, Plan* plan);
// Proof, limits, sampling, what a violation does, and the mode: the same for every selector.
void EditGuarantee(const Policy& policy, const StepContext& context, Plan* plan);

// The formulas of PSAW and ETF, in double, for tests and reports: positions hidden or frozen in
// `layer` at length t.
uint32_t PsawHiddenCount(const PsawParameters& psaw, uint32_t layer, uint32_t layer_count,
                         uint32_t length);
uint32_t EtfFrozenCount(const EtfParameters& etf, uint32_t layer, uint32_t layer_count,
                        uint32_t length);

}  // namespace kvservice

#endif  // KVSERVICE_SELECTOR_SELECTOR_H_
