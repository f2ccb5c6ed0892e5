// H2O (Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
// Models", NeurIPS 2023): the attention that every token has received so far is summed; a cache of
// fixed size keeps the most recent tokens and those of the largest sums and forgets the rest for
// good. Half of the budget is recent, as in its code; the local window is the first part of it.
//
// With a mass_limit the sums over all attention so far are the estimate: recent is the local window
// alone, and tokens are forgotten while what was forgotten holds at most that share of every head.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/prompt_only_index.h"
#include "selector/baselines/softmax.h"

namespace kvservice::baselines {
namespace {

// What the cache of one KV head holds besides the sinks.
struct Kept {
  std::vector<uint32_t> positions;       // Ascending.
  std::vector<std::vector<float>> sums;  // [group][positions]: attention received.
  std::vector<double> total;             // [group]: all attention so far, sinks included.
  std::vector<double> forgotten;         // [group]: of it, by tokens that were forgotten.
};

class H2o : public Baseline {
 public:
  H2o(const Prompt& prompt, const TokenBudget& budget)
      : shape_(prompt.shape), budget_(budget), kept_(prompt.heads.size()) {
    const uint32_t half = (budget.top_k + budget.local) / 2;
    const bool by_mass = budget.mass_limit > 0.0F;
    recent_ = by_mass ? budget.local : std::max(budget.local, half);
    heavy_ = by_mass ? 0 : budget.top_k + budget.local - recent_;
    for (const uint32_t head : ChoosingHeads(prompt)) {
      Start(prompt.heads[head].attention_sum, prompt.length, &kept_[head]);
    }
  }

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    Cost cost;
    const Middle middle = MiddleOf(budget_, step.length);
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      Kept& kept = kept_[step.layer * shape_.kv_head_count + kv_head];
      if (step.length > budget_.sink) Append(step.length - 1, &kept);
      Forget(step.length, &kept);
      const auto end = std::lower_bound(kept.positions.begin(), kept.positions.end(), middle.end);
      (*positions)[kv_head].assign(kept.positions.begin(), end);
      const double sums = static_cast<double>(kept.positions.size()) * shape_.group();
      cost.bytes += 4.0 * sums;
      cost.flops += sums;
      Accumulate(step, kv_head, &kept);
    }
    return cost;
  }

 private:
  void Start(absl::Span<const float> attention_sum, uint32_t length, Kept* kept) const {
    kept->sums.resize(shape_.group());
    kept->forgotten.assign(shape_.group(), 0.0);
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      const auto row = attention_sum.subspan(size_t{h} * length, length);
      double total = 0.0;
      for (const float sum : row) total += sum;
      kept->total.push_back(total);
      const auto past_sinks = row.subspan(std::min(budget_.sink, length));
      kept->sums[h].assign(past_sinks.begin(), past_sinks.end());
    }
    for (uint32_t token = budget_.sink; token < length; ++token) kept->positions.push_back(token);
    Forget(length, kept);
  }

  void Append(uint32_t position, Kept* kept) const {
    kept->positions.push_back(position);
    for (std::vector<float>& sums : kept->sums) sums.push_back(0.0F);
  }

  // Of the tokens that are no longer recent, only heavy ones stay.
  void Forget(uint32_t length, Kept* kept) const {
    const uint32_t recent_begin = length > recent_ ? length - recent_ : 0;
    const auto old_end =
        std::lower_bound(kept->positions.begin(), kept->positions.end(), recent_begin);
    const auto old_count = static_cast<uint32_t>(old_end - kept->positions.begin());
    if (budget_.mass_limit == 0.0F && old_count <= heavy_) return;
    std::vector<uint32_t> stay;  // Indices, ascending.
    ChooseHeavy(*kept, old_count, &stay);
    for (auto i = old_count; i < kept->positions.size(); ++i) stay.push_back(i);
    if (stay.size() == kept->positions.size()) return;
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      std::vector<float>& sums = kept->sums[h];
      double before = 0.0;
      for (uint32_t i = 0; i < old_count; ++i) before += sums[i];
      for (size_t i = 0; i < stay.size(); ++i) {
        if (stay[i] < old_count) before -= sums[stay[i]];
        sums[i] = sums[stay[i]];
      }
      sums.resize(stay.size());
      kept->forgotten[h] += std::max(before, 0.0);
    }
    for (size_t i = 0; i < stay.size(); ++i) kept->positions[i] = kept->positions[stay[i]];
    kept->positions.resize(stay.size());
  }

  void ChooseHeavy(const Kept& kept, uint32_t count, std::vector<uint32_t>* stay) const {
    std::vector<float> shares;  // [group][count]
    std::vector<double> forgotten;
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      const double total = std::max(kept.total[h], 1.0);  // Every query has attention 1.
      for (uint32_t i = 0; i < count; ++i) {
        shares.push_back(static_cast<float>(kept.sums[h][i] / total));
      }
      forgotten.push_back(kept.forgotten[h] / total);
    }
    const WeightRows rows = {shares.data(), count, shape_.group(), count};
    if (budget_.mass_limit > 0.0F) {
      KeepByMass(rows, budget_.mass_limit, forgotten, 0, stay);
    } else {
      KeepLargest(SumOverHeads(rows), heavy_, 0, stay);
    }
  }

  // Adds the step's attention over what is in the cache: sinks and kept tokens.
  void Accumulate(const Step& step, uint32_t kv_head, Kept* kept) const {
    const uint32_t sinks = std::min(budget_.sink, step.length);
    std::vector<float> weights(sinks + kept->positions.size());
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      const size_t query_head = size_t{kv_head} * shape_.group() + h;
      const float* const logits = step.logits.data() + query_head * step.length;
      std::copy_n(logits, sinks, weights.begin());
      std::transform(kept->positions.begin(), kept->positions.end(), weights.begin() + sinks,
                     [logits](uint32_t position) { return logits[position]; });
      Softmax(absl::MakeSpan(weights));
      std::vector<float>& sums = kept->sums[h];
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += weights[sinks + i];
      kept->total[h] += 1.0;
    }
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  uint32_t recent_ = 0;  // Tokens, the local window included.
  uint32_t heavy_ = 0;
  std::vector<Kept> kept_;  // [layer_count * kv_head_count]
};

}  // namespace

std::unique_ptr<const PromptIndex> NewH2o(const BaselineContext& context) {
  return std::make_unique<PromptOnlyIndex<H2o>>(context.prompt);
}

}  // namespace kvservice::baselines
