#include <algorithm>

#include "selector/depth_schedule.h"
#include "selector/selector.h"

namespace kvservice {

uint32_t EtfFrozenCount(const EtfParameters& etf, uint32_t layer, uint32_t layer_count,
                        uint32_t length) {
  const uint32_t first = etf.first_layer == EtfParameters::kTwoThirdsOfLayers
                             ? static_cast<uint32_t>(2 * static_cast<uint64_t>(layer_count) / 3)
                             : etf.first_layer;
  return DepthPrefix(etf.psi, etf.gamma, layer, first, layer_count, length);
}

// A prefix without a shallower layer's choice would be neither scanned nor chosen, so nothing is
// frozen then.
void EditEtf(const Policy& policy, const StepContext& context, Plan* plan) {
  if (context.shallower_lists == nullptr) return;
  const bool found = context.ruling != nullptr && context.ruling->frozen_share.has_value();
  const uint32_t frozen =
      found
          ? SharePrefix(*context.ruling->frozen_share, context.attended_length)
          : EtfFrozenCount(policy.etf, context.layer, context.layer_count, context.attended_length);
  const uint32_t end = std::min(frozen, plan->local_begin);
  if (end <= plan->sink_end) return;
  plan->frozen_lists = context.shallower_lists;
  plan->frozen_end = end;
}

}  // namespace kvservice
