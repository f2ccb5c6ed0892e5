// TidalDecode (Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent
// Sparse Attention", ICLR 2025): one early layer scores every key, later layers take over what it
// chose, a middle layer chooses once more.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/exact_scan.h"
#include "selector/baselines/prompt_only_index.h"

namespace kvservice::baselines {
namespace {

// Layers 0 and 1 are dense there. Layer 2 chooses, or the first that does; so does layer 13 of the
// 32 of LLaMA-3-8B, here the layer at the same depth, or the next one that chooses.
constexpr uint32_t kFirstChoice = 2;
constexpr double kCorrectionDepth = 13.0 / 32.0;

class TidalDecode : public Baseline {
 public:
  TidalDecode(const Prompt& prompt, const TokenBudget& budget)
      : shape_(prompt.shape),
        budget_(budget),
        layers_(ChoosingLayers(prompt)),
        first_layer_(std::max(kFirstChoice, layers_.front())),
        correction_layer_(*std::lower_bound(
            layers_.begin(), layers_.end() - 1,
            static_cast<uint32_t>(std::lround(shape_.layer_count * kCorrectionDepth)))) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    Cost cost;
    if (step.layer <= first_layer_ || step.layer == correction_layer_) {
      chosen_.assign(shape_.kv_head_count, {});
      cost = KeepByExactScan(step, shape_, budget_, &chosen_);
    }
    *positions = chosen_;
    return cost;
  }

 private:
  const ModelShape shape_;
  const TokenBudget budget_;
  const std::vector<uint32_t> layers_;
  const uint32_t first_layer_;
  const uint32_t correction_layer_;
  std::vector<std::vector<uint32_t>> chosen_;  // In this step, by the last layer that scored.
};

}  // namespace

std::unique_ptr<const PromptIndex> NewTidalDecode(const BaselineContext& context) {
  return std::make_unique<PromptOnlyIndex<TidalDecode>>(context.prompt);
}

}  // namespace kvservice::baselines
