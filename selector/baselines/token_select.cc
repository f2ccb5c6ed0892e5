// TokenSelect (Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation
// for LLMs via Dynamic Token-Level KV Cache Selection", 2024): all heads of a layer vote with their
// softmax over the middle, one set serves them all, and it is reused while the layer's query stays
// similar to the one it was made for. Queries are compared as the interface has them, rotated.
//
// As in its code, tokens that leave the local window while a set is reused are in neither, and the
// next choice is the first that can take them.

#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/exact_scan.h"
#include "selector/baselines/prompt_only_index.h"
#include "selector/baselines/softmax.h"

namespace kvservice::baselines {
namespace {

constexpr double kSimilarityMin = 0.9;

double CosineOf(absl::Span<const float> a, absl::Span<const float> b) {
  double ab = 0.0;
  double aa = 0.0;
  double bb = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return aa > 0.0 && bb > 0.0 ? ab / std::sqrt(aa * bb) : 0.0;
}

class TokenSelect : public Baseline {
 public:
  TokenSelect(const Prompt& prompt, const TokenBudget& budget)
      : shape_(prompt.shape), budget_(budget), layers_(shape_.layer_count) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    const Middle middle = MiddleOf(budget_, step.length);
    if (budget_.mass_limit == 0.0F && middle.count() <= budget_.top_k) {
      // There is nothing to choose, and nothing worth remembering.
      std::vector<uint32_t> all(middle.count());
      std::iota(all.begin(), all.end(), middle.begin);
      positions->assign(shape_.kv_head_count, all);
      return {};
    }
    Layer& layer = layers_[step.layer];
    Cost cost;
    if (!layer.query.empty()) cost.flops = 2.0 * static_cast<double>(step.q.size());
    if (layer.query.empty() || CosineOf(layer.query, step.q) < kSimilarityMin) {
      layer.query.assign(step.q.begin(), step.q.end());
      layer.chosen = Choose(step);
      const Cost scan = ExactScanCost(shape_, step.length);
      cost.heads_scanned = scan.heads_scanned;
      cost.bytes = scan.bytes;
      cost.flops += scan.flops;
    }
    positions->assign(shape_.kv_head_count, layer.chosen);
    return cost;
  }

 private:
  struct Layer {
    std::vector<float> query;  // [query_head_count][head_dim], empty = nothing was chosen yet.
    std::vector<uint32_t> chosen;
  };

  std::vector<uint32_t> Choose(const Step& step) const {
    std::vector<uint32_t> chosen;
    const uint32_t heads = shape_.query_head_count;
    const Middle middle = MiddleOf(budget_, step.length);
    if (budget_.mass_limit > 0.0F) {
      std::vector<float> probabilities(step.logits.begin(), step.logits.end());
      SoftmaxRows(absl::MakeSpan(probabilities), heads);
      KeepForGroup(probabilities, heads, step.length, budget_, &chosen);
      return chosen;
    }
    std::vector<float> votes;
    for (uint32_t head = 0; head < heads; ++head) {
      const auto row =
          step.logits.subspan(size_t{head} * step.length + middle.begin, middle.count());
      votes.insert(votes.end(), row.begin(), row.end());
    }
    SoftmaxRows(absl::MakeSpan(votes), heads);
    const WeightRows rows = {votes.data(), middle.count(), heads, middle.count()};
    KeepLargest(SumOverHeads(rows), budget_.top_k, middle.begin, &chosen);
    return chosen;
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  std::vector<Layer> layers_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewTokenSelect(const BaselineContext& context) {
  return std::make_unique<PromptOnlyIndex<TokenSelect>>(context.prompt);
}

}  // namespace kvservice::baselines
