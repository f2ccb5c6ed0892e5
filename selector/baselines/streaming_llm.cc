// StreamingLLM (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR
// 2024): sinks and a window, nothing else. The whole budget goes to the window. The original also
// numbers the positions inside its cache anew; here tokens keep the position they were stored with.

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/prompt_only_index.h"

namespace kvservice::baselines {
namespace {

class StreamingLlm : public Baseline {
 public:
  StreamingLlm(const Prompt& prompt, const TokenBudget& budget)
      : kv_head_count_(prompt.shape.kv_head_count), budget_(budget) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    const Middle middle = MiddleOf(budget_, step.length);
    std::vector<uint32_t> window(std::min(budget_.top_k, middle.count()));
    std::iota(window.begin(), window.end(), middle.end - static_cast<uint32_t>(window.size()));
    positions->assign(kv_head_count_, window);
    return {};
  }

 private:
  const uint32_t kv_head_count_;
  const TokenBudget budget_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewStreamingLlm(const BaselineContext& context) {
  return std::make_unique<PromptOnlyIndex<StreamingLlm>>(context.prompt);
}

}  // namespace kvservice::baselines
