// The index of methods that compute nothing ahead: their proposers start from the prompt itself.

#ifndef KVSERVICE_SELECTOR_BASELINES_PROMPT_ONLY_INDEX_H_
#define KVSERVICE_SELECTOR_BASELINES_PROMPT_ONLY_INDEX_H_

#include <memory>
#include <utility>

#include "selector/baselines/baselines.h"

namespace kvservice::baselines {

// Method: a Baseline made from (const Prompt&, const TokenBudget&).
template <typename Method>
class PromptOnlyIndex : public PromptIndex {
 public:
  explicit PromptOnlyIndex(std::shared_ptr<const Prompt> prompt) : prompt_(std::move(prompt)) {}
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<Method>(*prompt_, budget);
  }

 private:
  const std::shared_ptr<const Prompt> prompt_;
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_PROMPT_ONLY_INDEX_H_
