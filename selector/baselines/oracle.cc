// The oracle: exact attention decides. What a method of equal size can reach at best (per step; a
// list that later steps share may do better with other tokens).

#include <memory>
#include <vector>

#include "selector/baselines/baselines.h"
#include "selector/baselines/exact_scan.h"
#include "selector/baselines/prompt_only_index.h"

namespace kvservice::baselines {
namespace {

class Oracle : public Baseline {
 public:
  Oracle(const Prompt& prompt, const TokenBudget& budget) : shape_(prompt.shape), budget_(budget) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    return KeepByExactScan(step, shape_, budget_, positions);
  }

 private:
  const ModelShape shape_;
  const TokenBudget budget_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewOracle(const BaselineContext& context) {
  return std::make_unique<PromptOnlyIndex<Oracle>>(context.prompt);
}

}  // namespace kvservice::baselines
