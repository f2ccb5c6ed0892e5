// SnapKV (Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024):
// once, after the prompt, the attention of its last 32 queries is summed per token, smoothed by an
// average over 5 neighbours, and the largest are kept besides those queries' own tokens. Nothing is
// chosen again, and what is decoded is kept.
//
// The budget is the same for all methods here, so what is decoded takes the places of the weakest
// of the prompt. With a mass_limit the smoothed sums are the estimate of the dropped mass, the
// choice is made once by it, and everything decoded is kept besides.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/for_each_index.h"
#include "selector/baselines/softmax.h"
#include "selector/baselines/token_tiles.h"

namespace kvservice::baselines {
namespace {

// Defaults of its code's class and scripts.
constexpr uint32_t kWindow = 32;
constexpr uint32_t kPool = 5;

// Averages over kPool neighbours; what is outside counts as 0.
void Smooth(absl::Span<float> values) {
  const std::vector<float> old(values.begin(), values.end());
  constexpr size_t kReach = kPool / 2;
  for (size_t i = 0; i < old.size(); ++i) {
    const auto begin = old.begin() + (i > kReach ? i - kReach : 0);
    const auto end = old.begin() + std::min(i + kReach + 1, old.size());
    values[i] = std::accumulate(begin, end, 0.0F) / kPool;
  }
}

// Attention of the window's queries to the tokens before it, smoothed, as a share of all their
// attention: [group][length - window].
std::vector<float> WindowAttention(const Prompt& prompt, uint32_t head, uint32_t window) {
  const uint32_t channels = prompt.shape.head_dim;
  const uint32_t group = prompt.shape.group();
  TokenTiles<float> keys(channels);
  keys.Reserve(prompt.length);
  for (uint32_t token = 0; token < prompt.length; ++token) {
    keys.Append(prompt.heads[head].keys.subspan(size_t{token} * channels, channels));
  }
  const uint32_t before = prompt.length - window;
  std::vector<float> sums(size_t{group} * before, 0.0F);
  std::vector<float> logits(size_t{group} * prompt.length);
  std::vector<float> q(size_t{group} * channels);
  for (uint32_t i = 0; i < window; ++i) {
    const size_t first = size_t{prompt.query_count - window + i} * q.size();
    const auto queries = prompt.heads[head].queries.subspan(first, q.size());
    std::transform(queries.begin(), queries.end(), q.begin(),
                   [&](float value) { return value * prompt.shape.scale; });
    keys.Dot(q, group, logits.data(), prompt.length);
    for (uint32_t h = 0; h < group; ++h) {
      // Query i sees the tokens up to its own.
      const auto seen = absl::MakeSpan(logits).subspan(size_t{h} * prompt.length, before + i + 1);
      Softmax(seen);
      float* const sum = sums.data() + size_t{h} * before;
      for (uint32_t t = 0; t < before; ++t) sum[t] += seen[t] / static_cast<float>(window);
    }
  }
  for (uint32_t h = 0; h < group; ++h) {
    Smooth(absl::MakeSpan(sums).subspan(size_t{h} * before, before));
  }
  return sums;
}

struct Observed {
  ModelShape shape;
  uint32_t length = 0;
  uint32_t window = 0;
  std::vector<std::vector<float>> attention;  // Per head, of WindowAttention.
};

class SnapKv : public Baseline {
 public:
  SnapKv(const Observed& observed, const TokenBudget& budget)
      : shape_(observed.shape), budget_(budget) {
    const uint32_t always = std::max(observed.window, budget.local);
    chosen_end_ = observed.length > always ? observed.length - always : 0;
    chosen_end_ = std::max(chosen_end_, budget.sink);
    for (const std::vector<float>& attention : observed.attention) {
      chosen_.push_back(Choose(attention, observed.length - observed.window));
    }
  }

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    const Middle middle = MiddleOf(budget_, step.length);
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      std::vector<uint32_t>& out = (*positions)[kv_head];
      const std::vector<uint32_t>& chosen = chosen_[step.layer * shape_.kv_head_count + kv_head];
      // Everything since the choice, the newest first where it is too much.
      uint32_t since = middle.end > chosen_end_ ? middle.end - chosen_end_ : 0;
      size_t places = chosen.size();
      if (budget_.mass_limit == 0.0F) {
        since = std::min(since, budget_.top_k);
        places = std::min<size_t>(places, budget_.top_k - since);
      }
      out.assign(chosen.begin(), chosen.begin() + static_cast<std::ptrdiff_t>(places));
      if (budget_.mass_limit == 0.0F) std::sort(out.begin(), out.end());
      for (uint32_t token = middle.end - since; token < middle.end; ++token) out.push_back(token);
    }
    return {};
  }

 private:
  // By mass: ascending. Else the strongest first, so that the weakest can give way.
  std::vector<uint32_t> Choose(const std::vector<float>& attention, uint32_t before) const {
    std::vector<uint32_t> chosen;
    // Of a layer that is read whole, or a prompt within the window, there is none.
    if (attention.empty() || chosen_end_ <= budget_.sink) return chosen;
    const uint32_t count = chosen_end_ - budget_.sink;
    const WeightRows rows = {attention.data() + budget_.sink, before, shape_.group(), count};
    if (budget_.mass_limit > 0.0F) {
      KeepByMass(rows, budget_.mass_limit, {}, budget_.sink, &chosen);
      return chosen;
    }
    const std::vector<float> sums = SumOverHeads(rows);
    KeepLargest(sums, budget_.top_k, budget_.sink, &chosen);
    std::stable_sort(chosen.begin(), chosen.end(), [&](uint32_t a, uint32_t b) {
      return sums[a - budget_.sink] > sums[b - budget_.sink];
    });
    return chosen;
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  uint32_t chosen_end_ = 0;                    // Tokens from here on were never up for choice.
  std::vector<std::vector<uint32_t>> chosen_;  // [layer_count * kv_head_count]
};

class SnapKvIndex : public PromptIndex {
 public:
  explicit SnapKvIndex(const BaselineContext& context) {
    const Prompt& prompt = *context.prompt;
    observed_ = {.shape = prompt.shape,
                 .length = prompt.length,
                 .window = std::min(kWindow, prompt.query_count),
                 .attention = std::vector<std::vector<float>>(prompt.heads.size())};
    ForEachIndex(ChoosingHeads(prompt), context.threads, [&](uint32_t head) {
      observed_.attention[head] = WindowAttention(prompt, head, observed_.window);
    });
  }
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<SnapKv>(observed_, budget);
  }

 private:
  Observed observed_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewSnapKv(const BaselineContext& context) {
  return std::make_unique<SnapKvIndex>(context);
}

}  // namespace kvservice::baselines
