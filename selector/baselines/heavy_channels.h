// The labels of Double Sparsity (Yang et al., "Post-Training Sparse Attention with Double
// Sparsity", 2024), which HShare and vAttention choose with here too: of every key the channels
// that matter most for q.k on another text, in four bits.

#ifndef KVSERVICE_SELECTOR_BASELINES_HEAVY_CHANNELS_H_
#define KVSERVICE_SELECTOR_BASELINES_HEAVY_CHANNELS_H_

#include <cstdint>
#include <vector>

#include "selector/baselines/baselines.h"
#include "selector/baselines/label_index.h"
#include "selector/baselines/label_stores.h"

namespace kvservice::baselines {

// The r channels of one head with the largest mean |q_c k_c| over all pairs of the calibration's
// queries and keys, ascending. That mean is the product of the means of |q_c| and |k_c|.
std::vector<uint32_t> HeavyChannels(const Prompt& calibration, uint32_t head, uint32_t r);

// Labels of the prompt's keys: head_dim / 4 channels (LongBench scripts of its code), chosen by the
// calibration.
LabelIndex<FourBitLabels> HeavyChannelLabels(const BaselineContext& context);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_HEAVY_CHANNELS_H_
