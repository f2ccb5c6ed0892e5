#include "selector/selector.h"

#include <algorithm>
#include <cassert>

#include "selector/assumed.h"

namespace kvservice {
namespace {

// The entry that rules `layer`: the last one that covers it.
const LayerOverride* FindOverride(const Policy& policy, uint32_t layer) {
  for (size_t i = policy.layers.size(); i-- > 0;) {
    const LayerOverride& entry = policy.layers[i];
    if (entry.layer_begin <= layer && layer < entry.layer_end) return &entry;
  }
  return nullptr;
}

// Every token is read: valid for every length, and what the edits start from.
Plan DensePlan(const Budget& budget, const StepContext& context) {
  const uint32_t local = std::max(budget.local, context.query_count);
  Plan plan;
  plan.source = Source::kAll;
  plan.local_begin = context.attended_length - std::min(context.attended_length, local);
  plan.sink_end = std::min(budget.sink, plan.local_begin);
  plan.visible_begin = 0;
  return plan;
}

// CIS in the paper's form starts a new block at every multiple of block_steps; a row starts one if
// any of its query tokens stands there.
bool StartsCisBlock(const CisParameters& cis, const StepContext& context) {
  if (cis.block_steps == 0) return false;
  const uint32_t position = context.attended_length - context.query_count;
  const uint32_t into_block = position % cis.block_steps;
  return into_block == 0 || into_block + context.query_count > cis.block_steps;
}

void ApplyEdits(SelectorKind selector, const Policy& policy, const StepContext& context,
                Plan* plan) {
  switch (selector) {
    case SelectorKind::kAuto:
    case SelectorKind::kDense:
      return;
    case SelectorKind::kGiven:
      EditGiven(policy, context, plan);
      break;
    case SelectorKind::kCis:
      EditCis(policy, context, plan);
      break;
    case SelectorKind::kScan:
      EditScan(policy, context, plan);
      break;
    case SelectorKind::kPsaw:
      EditScan(policy, context, plan);
      EditPsaw(policy, context, plan);
      break;
    case SelectorKind::kEtf:
      EditScan(policy, context, plan);
      EditEtf(policy, context, plan);
      break;
    case SelectorKind::kCpe:
      EditCis(policy, context, plan);
      EditPsaw(policy, context, plan);
      EditEtf(policy, context, plan);
      break;
    case SelectorKind::kCertified:
      EditCertified(policy, context, plan);
      break;
  }
  EditGuarantee(policy, context, plan);
}

bool Freezes(SelectorKind selector) {
  return selector == SelectorKind::kEtf || selector == SelectorKind::kCpe;
}

// Some layer under this policy may take over the choice of a shallower one.
bool MayFreeze(const Policy& policy) {
  return Freezes(policy.selector) ||
         std::any_of(policy.layers.begin(), policy.layers.end(), [](const LayerOverride& ruling) {
           return ruling.selector.has_value() && Freezes(*ruling.selector);
         });
}

// What calibration has found for theory, about what the plan hides and freezes.
void Assume(const StepContext& context, PlannedStep* step) {
  const LayerOverride* ruling = context.ruling;
  const Plan& plan = step->plan;
  if (ruling == nullptr) return;
  if (ruling->psaw_decay_scale.has_value() && plan.visible_begin > plan.sink_end) {
    step->assumed_psaw_dropped_mass =
        AssumedHiddenMass(*ruling->psaw_decay_scale, *ruling->psaw_decay_rate,
                          context.attended_length - plan.visible_begin);
  }
  if (ruling->etf_logit_drift.has_value() && plan.frozen_lists != nullptr) {
    step->assumed_etf_excess_mass = AssumedFreezingExcess(*ruling->etf_logit_drift);
  }
}

}  // namespace

void EditGuarantee(const Policy& policy, const StepContext& /*context*/, Plan* plan) {
  plan->prove = policy.guarantee;
  plan->max_dropped_mass = policy.max_dropped_mass;
  plan->max_output_error = policy.max_output_error;
  plan->failure_probability = policy.failure_probability;
  plan->draws_max = policy.draws_max;
  plan->on_violation = policy.on_violation;
  plan->mode = policy.mode;
}

SelectorKind ResolveSelector(const Policy& policy, const StepContext& context) {
  // A window is short, and the masses of its layer refer to it: it is read whole.
  if (context.sliding_window > 0) return SelectorKind::kDense;
  const LayerOverride* ruling = FindOverride(policy, context.layer);
  const SelectorKind selector =
      ruling != nullptr ? ruling->selector.value_or(policy.selector) : policy.selector;
  if (selector == SelectorKind::kGiven) return selector;
  if (context.attended_length < policy.dense_below_tokens) return SelectorKind::kDense;
  if (selector != SelectorKind::kAuto) return selector;
  const bool gains = context.attended_length >= context.certified_from_tokens;
  return gains ? SelectorKind::kCertified : SelectorKind::kDense;
}

bool UsesLists(SelectorKind selector) {
  return selector == SelectorKind::kCis || selector == SelectorKind::kEtf ||
         selector == SelectorKind::kCpe || selector == SelectorKind::kCertified ||
         selector == SelectorKind::kScan;
}

PlannedStep MakePlan(const Policy& policy, const StepContext& context) {
  assert(context.query_count >= 1 && context.query_count <= context.attended_length);
  assert(context.layer < context.layer_count);
  StepContext ruled = context;
  ruled.ruling = FindOverride(policy, context.layer);
  PlannedStep step;
  step.selector = ResolveSelector(policy, context);
  step.plan = DensePlan(BudgetOf(policy, ruled), ruled);
  ApplyEdits(step.selector, policy, ruled, &step.plan);
  step.plan.keeps_selection = MayFreeze(policy);
  Assume(ruled, &step);
  step.drop_lists = step.plan.source == Source::kReuse && StartsCisBlock(policy.cis, context);
  return step;
}

}  // namespace kvservice
