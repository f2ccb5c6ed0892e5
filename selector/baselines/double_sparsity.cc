// Double Sparsity: the labels of heavy_channels.h are scanned with every step.

#include <memory>

#include "selector/baselines/baselines.h"
#include "selector/baselines/heavy_channels.h"
#include "selector/baselines/label_scan_index.h"

namespace kvservice::baselines {

std::unique_ptr<const PromptIndex> NewDoubleSparsity(const BaselineContext& context) {
  return std::make_unique<LabelScanIndex<FourBitLabels>>(HeavyChannelLabels(context));
}

}  // namespace kvservice::baselines
