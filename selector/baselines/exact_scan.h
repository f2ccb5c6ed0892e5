// Scoring every key exactly, for the methods that do so in some layers or steps. Pure; any thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_EXACT_SCAN_H_
#define KVSERVICE_SELECTOR_BASELINES_EXACT_SCAN_H_

#include <cstdint>
#include <vector>

#include "selector/baselines/baseline.h"

namespace kvservice::baselines {

// All keys of the layer, read once, and their dot products with all query heads.
Cost ExactScanCost(const ModelShape& shape, uint32_t length);

// Appends to positions[kv_head] what KeepForGroup keeps under the step's true logits.
Cost KeepByExactScan(const Step& step, const ModelShape& shape, const TokenBudget& budget,
                     std::vector<std::vector<uint32_t>>* positions);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_EXACT_SCAN_H_
