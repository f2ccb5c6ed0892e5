#include <algorithm>

#include "selector/depth_schedule.h"
#include "selector/selector.h"

namespace kvservice {

uint32_t PsawHiddenCount(const PsawParameters& psaw, uint32_t layer, uint32_t layer_count,
                         uint32_t length) {
  const uint32_t first =
      psaw.first_layer == PsawParameters::kHalfOfLayers ? layer_count / 2 : psaw.first_layer;
  return DepthPrefix(psaw.phi, psaw.alpha, layer, first, layer_count, length);
}

// Only the left edge moves. Sinks are spared because the plan reads them whatever is hidden, and
// the cut is made at every step, so a list found when less was hidden loses the tokens that are
// now.
void EditPsaw(const Policy& policy, const StepContext& context, Plan* plan) {
  const bool found = context.ruling != nullptr && context.ruling->hidden_share.has_value();
  const uint32_t hidden = found
                              ? SharePrefix(*context.ruling->hidden_share, context.attended_length)
                              : PsawHiddenCount(policy.psaw, context.layer, context.layer_count,
                                                context.attended_length);
  plan->visible_begin = std::min(std::max(plan->visible_begin, hidden), plan->local_begin);
}

}  // namespace kvservice
