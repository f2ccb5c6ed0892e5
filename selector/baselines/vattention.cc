// vAttention (Desai et al., "vAttention: Verified Sparse Attention", 2025): part of the budget goes
// to the tokens that a cheap scorer predicts to be the largest, the rest is drawn uniformly from
// the others. Half and half here, predicted with Double Sparsity's labels. The published method
// weights the draws by the inverse of their probability and sizes the sample by a central limit
// theorem; only its tokens are compared here, which is unfavourable to it.
//
// With a mass_limit the predicted part is what the labels estimate to be enough, and as many are
// drawn besides.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/heavy_channels.h"
#include "selector/baselines/random_numbers.h"

namespace kvservice::baselines {
namespace {

class VAttention : public Baseline {
 public:
  VAttention(const LabelIndex<FourBitLabels>& labels, const TokenBudget& budget, uint64_t seed)
      : shape_(labels.shape()), budget_(budget), seed_(seed), estimator_(labels) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    Cost cost = AppendKeys(step, shape_, &estimator_);
    std::vector<float> probabilities;
    TokenBudget predicted = budget_;
    predicted.top_k = budget_.top_k - budget_.top_k / 2;
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      std::vector<uint32_t>& out = (*positions)[kv_head];
      EstimateProbabilities(step, shape_, estimator_, kv_head, &probabilities);
      KeepForGroup(probabilities, shape_.group(), step.length, predicted, &out);
      Add(estimator_.EstimateCost(step.length), &cost);
      const auto drawn =
          budget_.mass_limit > 0.0F ? static_cast<uint32_t>(out.size()) : budget_.top_k / 2;
      Draw(RandomNumbers({seed_, step.layer, kv_head, step.length}), MiddleOf(budget_, step.length),
           drawn, &out);
    }
    return cost;
  }

 private:
  // Adds `count` tokens of the middle, or all, uniformly from those that are not in `kept`.
  static void Draw(RandomNumbers random, const Middle& middle, uint32_t count,
                   std::vector<uint32_t>* kept) {
    std::vector<uint32_t> all(middle.count());
    std::iota(all.begin(), all.end(), middle.begin);
    std::vector<uint32_t> others;
    others.reserve(all.size());
    std::set_difference(all.begin(), all.end(), kept->begin(), kept->end(),
                        std::back_inserter(others));
    const auto rest = static_cast<uint32_t>(others.size());
    const uint32_t drawn = std::min(count, rest);
    for (uint32_t i = 0; i < drawn; ++i) std::swap(others[i], others[i + random.Below(rest - i)]);
    kept->insert(kept->end(), others.begin(), others.begin() + drawn);
    std::sort(kept->begin(), kept->end());
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  const uint64_t seed_;
  LabelEstimator<FourBitLabels> estimator_;
};

class VAttentionIndex : public PromptIndex {
 public:
  explicit VAttentionIndex(const BaselineContext& context)
      : labels_(HeavyChannelLabels(context)), seed_(context.seed) {}
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<VAttention>(labels_, budget, seed_);
  }

 private:
  const LabelIndex<FourBitLabels> labels_;
  const uint64_t seed_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewVAttention(const BaselineContext& context) {
  return std::make_unique<VAttentionIndex>(context);
}

}  // namespace kvservice::baselines
