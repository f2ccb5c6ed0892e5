// Quest (Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML
// 2024): of every page of 16 keys the smallest and largest value per channel are kept; with them
// sum over c of max(q_c min_c, q_c max_c) bounds every q.k of the page from above, and the pages
// with the largest bounds are read whole.
//
// A page's weight in a head is its bound's share of the softmax over all tokens, each token counted
// with its page's bound. Pages at the ends of the middle count with the tokens that lie in it. The
// code's minimum of three pages is left out: sinks and local window are always read here.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/for_each_index.h"
#include "selector/baselines/softmax.h"
#include "selector/baselines/token_tiles.h"

namespace kvservice::baselines {
namespace {

constexpr uint32_t kPageTokens = 16;

// Smallest and largest key per channel of the pages of some tokens of one head.
class Pages {
 public:
  explicit Pages(uint32_t channels) : low_(channels), high_(channels) {}

  uint32_t count() const { return low_.size(); }

  void Append(absl::Span<const float> key) {
    if (token_count_++ % kPageTokens == 0) {
      last_low_.assign(key.begin(), key.end());
      last_high_ = last_low_;
      low_.Append(last_low_);
      high_.Append(last_high_);
      return;
    }
    for (size_t c = 0; c < key.size(); ++c) {
      last_low_[c] = std::min(last_low_[c], key[c]);
      last_high_[c] = std::max(last_high_[c], key[c]);
    }
    low_.Set(low_.size() - 1, last_low_);
    high_.Set(high_.size() - 1, last_high_);
  }

  // bounds[h * stride + page]. max(q low, q high) is q high where q > 0 and q low elsewhere.
  void Bound(absl::Span<const float> q, uint32_t heads, float* bounds, size_t stride) const {
    std::vector<float> positive(q.size());
    std::vector<float> negative(q.size());
    std::transform(q.begin(), q.end(), positive.begin(), [](float x) { return std::max(x, 0.0F); });
    std::transform(q.begin(), q.end(), negative.begin(), [](float x) { return std::min(x, 0.0F); });
    std::vector<float> lows(size_t{heads} * count());
    high_.Dot(positive, heads, bounds, stride);
    low_.Dot(negative, heads, lows.data(), count());
    for (uint32_t h = 0; h < heads; ++h) {
      for (uint32_t page = 0; page < count(); ++page) {
        bounds[h * stride + page] += lows[size_t{h} * count() + page];
      }
    }
  }

 private:
  TokenTiles<float> low_;  // A "token" is a page.
  TokenTiles<float> high_;
  std::vector<float> last_low_;
  std::vector<float> last_high_;
  uint32_t token_count_ = 0;
};

struct PromptPages {
  ModelShape shape;
  std::vector<Pages> full;  // Per head, those that the prompt fills.
  std::vector<Pages> tail;  // Per head, the one that it begins.
};

class Quest : public Baseline {
 public:
  Quest(const PromptPages& prompt, const TokenBudget& budget)
      : shape_(prompt.shape), budget_(budget), prompt_(prompt), tails_(prompt.tail) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    const uint32_t pages = (step.length + kPageTokens - 1) / kPageTokens;
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      const uint32_t head = step.layer * shape_.kv_head_count + kv_head;
      tails_[head].Append(NewKeyOf(step, shape_, kv_head));
      Choose(TokenProbabilities(head, QueriesOf(step, shape_, kv_head), pages, step.length),
             step.length, &(*positions)[kv_head]);
    }
    // Two keys per page; one product per channel, for the sign of q says with which of them.
    const double channels = static_cast<double>(pages) * shape_.head_dim;
    return {.heads_scanned = shape_.kv_head_count,
            .bytes = 4.0 * channels * shape_.kv_head_count,
            .flops = 2.0 * channels * shape_.query_head_count};
  }

 private:
  // Of one token of every page, [group][pages].
  std::vector<float> TokenProbabilities(uint32_t head, absl::Span<const float> queries,
                                        uint32_t pages, uint32_t length) const {
    const uint32_t group = shape_.group();
    std::vector<float> q(queries.begin(), queries.end());
    for (float& value : q) value *= shape_.scale;
    std::vector<float> bounds(size_t{group} * pages);
    const Pages& full = prompt_.full[head];
    full.Bound(q, group, bounds.data(), pages);
    tails_[head].Bound(q, group, bounds.data() + full.count(), pages);
    // exp(bound) over its sum over pages is a token's share, were all pages of one token. With
    // their true sizes the shares must add to 1.
    SoftmaxRows(absl::MakeSpan(bounds), group);
    const uint32_t last_tokens = length - (pages - 1) * kPageTokens;
    for (uint32_t h = 0; h < group; ++h) {
      const auto row = absl::MakeSpan(bounds).subspan(size_t{h} * pages, pages);
      const float total = kPageTokens * (1.0F - row.back()) + last_tokens * row.back();
      for (float& share : row) share /= total;
    }
    return bounds;
  }

  void Choose(const std::vector<float>& token_shares, uint32_t length,
              std::vector<uint32_t>* out) const {
    const Middle middle = MiddleOf(budget_, length);
    if (middle.count() == 0) return;
    const auto pages = static_cast<uint32_t>(token_shares.size() / shape_.group());
    const uint32_t first = middle.begin / kPageTokens;
    const uint32_t count = (middle.end - 1) / kPageTokens + 1 - first;
    const WeightRows rows = {token_shares.data() + first, pages, shape_.group(), count};
    std::vector<uint32_t> kept = budget_.mass_limit > 0.0F ? PagesByMass(rows, middle, first)
                                                           : LargestPages(rows, middle, first);
    for (const uint32_t page : kept) {
      const Middle tokens = TokensOf(page, middle);
      for (uint32_t token = tokens.begin; token < tokens.end; ++token) out->push_back(token);
    }
  }

  // The tokens of a page that lie in the middle.
  static Middle TokensOf(uint32_t page, const Middle& middle) {
    return {std::max(page * kPageTokens, middle.begin),
            std::min((page + 1) * kPageTokens, middle.end)};
  }

  std::vector<uint32_t> PagesByMass(const WeightRows& rows, const Middle& middle,
                                    uint32_t first) const {
    std::vector<float> masses;  // [group][count]
    for (uint32_t h = 0; h < rows.heads; ++h) {
      for (uint32_t i = 0; i < rows.count; ++i) {
        masses.push_back(rows.row(h)[i] * static_cast<float>(TokensOf(first + i, middle).count()));
      }
    }
    std::vector<uint32_t> kept;
    KeepByMass({masses.data(), rows.count, rows.heads, rows.count}, budget_.mass_limit, {}, first,
               &kept);
    return kept;
  }

  // Down the order of pages until the next one does not fit. A full page more than top_k / 16 can
  // not be read, a page cut by the middle's ends may.
  std::vector<uint32_t> LargestPages(const WeightRows& rows, const Middle& middle,
                                     uint32_t first) const {
    const std::vector<float> weights = SumOverHeads(rows);
    std::vector<uint32_t> order;
    KeepLargest(weights, budget_.top_k / kPageTokens + 2, first, &order);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return weights[a - first] > weights[b - first];
    });
    uint32_t left = budget_.top_k;
    size_t kept = 0;
    while (kept < order.size() && TokensOf(order[kept], middle).count() <= left) {
      left -= TokensOf(order[kept++], middle).count();
    }
    order.resize(kept);
    std::sort(order.begin(), order.end());
    return order;
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  const PromptPages& prompt_;
  std::vector<Pages> tails_;  // [layer_count * kv_head_count], from the first page not full.
};

class QuestIndex : public PromptIndex {
 public:
  explicit QuestIndex(const BaselineContext& context) {
    const Prompt& prompt = *context.prompt;
    const uint32_t channels = prompt.shape.head_dim;
    const uint32_t full_end = prompt.length - prompt.length % kPageTokens;
    pages_ = {.shape = prompt.shape,
              .full = std::vector<Pages>(prompt.heads.size(), Pages(channels)),
              .tail = std::vector<Pages>(prompt.heads.size(), Pages(channels))};
    ForEachIndex(ChoosingHeads(prompt), context.threads, [&](uint32_t head) {
      for (uint32_t token = 0; token < prompt.length; ++token) {
        Pages& pages = token < full_end ? pages_.full[head] : pages_.tail[head];
        pages.Append(prompt.heads[head].keys.subspan(size_t{token} * channels, channels));
      }
    });
  }
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<Quest>(pages_, budget);
  }

 private:
  PromptPages pages_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewQuest(const BaselineContext& context) {
  return std::make_unique<QuestIndex>(context);
}

}  // namespace kvservice::baselines
