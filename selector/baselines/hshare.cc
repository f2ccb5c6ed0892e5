// HShare (Wu et al., "HShare: Fast LLM Decoding by Hierarchical Key-Value Sharing", ICLR 2025):
// layers, heads and steps share choices. From the prompt's queries it is learnt, once, which layers
// and which heads choose alike; then every other step scores at all, in the layers and heads that
// copy nobody, with Double Sparsity's labels.
//
// Lists belong to KV heads here, so heads share by KV head: of few KV heads, half rounded down
// share, and a model with one has no head sharing. On steps in between the list of the layer is
// used again together with the tokens that have left the local window since; for them it is kept
// that much shorter than top_k.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/for_each_index.h"
#include "selector/baselines/heavy_channels.h"
#include "selector/baselines/sharing_map.h"
#include "selector/baselines/softmax.h"

namespace kvservice::baselines {
namespace {

// Its shipped configuration: 16 of 32 layers, 16 of 32 heads, every 2nd step.
constexpr uint32_t kLayerShare = 2;
constexpr uint32_t kHeadShare = 2;
constexpr uint32_t kQueryShare = 2;
// Prompt queries, evenly spaced among those there are, whose choices are compared.
constexpr uint32_t kMapQueriesMax = 64;

struct Maps {
  std::vector<uint32_t> layer_source;              // [layer_count], of the prompt's layers.
  std::vector<std::vector<uint32_t>> head_source;  // [layer_count][kv_head_count]
};

// Which tokens each of the compared queries chooses, of one head: bits, [queries][words].
using Choices = std::vector<uint64_t>;

double Overlap(const Choices& a, const Choices& b) {
  uint64_t common = 0;
  for (size_t i = 0; i < a.size(); ++i) common += std::popcount(a[i] & b[i]);
  return static_cast<double>(common);
}

// What the labels of the prompt's keys make its late queries choose.
Choices ChoicesOf(const Prompt& prompt, const LabelIndex<FourBitLabels>& labels, uint32_t head,
                  const TokenBudget& budget) {
  const uint32_t group = prompt.shape.group();
  const uint32_t queries = std::min(prompt.query_count, kMapQueriesMax);
  const size_t words = (prompt.length + 63) / 64;
  const size_t numbers = size_t{group} * prompt.shape.head_dim;
  Choices choices(queries * words, 0);
  std::vector<float> logits(size_t{group} * prompt.length);
  std::vector<float> seen;
  for (uint32_t i = 0; i < queries; ++i) {
    const auto query = static_cast<uint32_t>(uint64_t{i} * prompt.query_count / queries);
    const uint32_t length = prompt.length - prompt.query_count + query + 1;
    const std::vector<float> q =
        labels.QueryLabels(head, prompt.heads[head].queries.subspan(query * numbers, numbers));
    labels.store(head).Dot(q, group, logits.data(), prompt.length);
    seen.clear();
    for (uint32_t h = 0; h < group; ++h) {
      const auto row = logits.begin() + static_cast<std::ptrdiff_t>(size_t{h} * prompt.length);
      seen.insert(seen.end(), row, row + length);
    }
    SoftmaxRows(absl::MakeSpan(seen), group);
    std::vector<uint32_t> kept;
    KeepForGroup(seen, group, length, budget, &kept);
    for (const uint32_t token : kept) choices[i * words + token / 64] |= 1ULL << (token % 64);
  }
  return choices;
}

// The overlaps' common denominators (tokens chosen, queries, heads) are left out: only their order
// is used.
Maps LearnMaps(const ModelShape& shape, const std::vector<uint32_t>& layers,
               const std::vector<Choices>& choices) {
  const uint32_t heads = shape.kv_head_count;
  std::vector<std::vector<double>> between(layers.size(), std::vector<double>(layers.size(), 0.0));
  Maps maps;
  maps.layer_source.resize(shape.layer_count);
  maps.head_source.resize(shape.layer_count);
  for (size_t i = 0; i < layers.size(); ++i) {
    const size_t first = size_t{layers[i]} * heads;
    std::vector<std::vector<double>> own(heads, std::vector<double>(heads, 0.0));
    for (uint32_t head = 0; head < heads; ++head) {
      const Choices& here = choices[first + head];
      for (uint32_t j = 0; j < head; ++j) own[head][j] = Overlap(here, choices[first + j]);
      for (size_t j = 0; j < i; ++j) {
        between[i][j] += Overlap(here, choices[size_t{layers[j]} * heads + head]);
      }
    }
    maps.head_source[layers[i]] = ShareGreedily(own, heads / kHeadShare);
  }
  const std::vector<uint32_t> sources =
      ShareGreedily(between, static_cast<uint32_t>(layers.size()) / kLayerShare);
  for (size_t i = 0; i < layers.size(); ++i) maps.layer_source[layers[i]] = layers[sources[i]];
  return maps;
}

class HShare : public Baseline {
 public:
  HShare(const LabelIndex<FourBitLabels>& labels, const Maps& maps, const TokenBudget& budget)
      : shape_(labels.shape()),
        budget_(budget),
        maps_(maps),
        estimator_(labels),
        layers_(shape_.layer_count) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    Cost cost = AppendKeys(step, shape_, &estimator_);
    Layer& layer = layers_[step.layer];
    const Middle middle = MiddleOf(budget_, step.length);
    if (layer.lists.empty() || step.length % kQueryShare == 0) {
      Retrieve(step, &cost);
      layer.middle_end = middle.end;
    }
    positions->resize(shape_.kv_head_count);
    const bool reuses = layer.middle_end != middle.end;
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      const List& list = layer.lists[kv_head];
      std::vector<uint32_t>& out = (*positions)[kv_head];
      out = reuses ? list.for_reuse : list.now;
      if (budget_.mass_limit == 0.0F && budget_.top_k < kQueryShare - 1) continue;
      for (uint32_t token = layer.middle_end; token < middle.end; ++token) out.push_back(token);
    }
    return cost;
  }

 private:
  struct List {
    std::vector<uint32_t> now;
    // Shorter by what can leave the local window before the next choice.
    std::vector<uint32_t> for_reuse;
  };
  struct Layer {
    std::vector<List> lists;  // [kv_head_count], empty = nothing was chosen yet.
    uint32_t middle_end = 0;  // When they were chosen.
  };

  void Retrieve(const Step& step, Cost* cost) {
    const uint32_t source_layer = maps_.layer_source[step.layer];
    if (source_layer != step.layer) {
      layers_[step.layer].lists = layers_[source_layer].lists;
      return;
    }
    std::vector<List>& lists = layers_[step.layer].lists;
    lists.assign(shape_.kv_head_count, {});
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      const uint32_t source_head = maps_.head_source[step.layer][kv_head];
      if (source_head != kv_head) {
        lists[kv_head] = lists[source_head];
        continue;
      }
      lists[kv_head] = Choose(step, kv_head);
      Add(estimator_.EstimateCost(step.length), cost);
    }
  }

  List Choose(const Step& step, uint32_t kv_head) const {
    std::vector<float> probabilities;
    EstimateProbabilities(step, shape_, estimator_, kv_head, &probabilities);
    List list;
    KeepForGroup(probabilities, shape_.group(), step.length, budget_, &list.now);
    TokenBudget shorter = budget_;
    shorter.top_k -= std::min(shorter.top_k, kQueryShare - 1);
    KeepForGroup(probabilities, shape_.group(), step.length, shorter, &list.for_reuse);
    return list;
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  const Maps& maps_;
  LabelEstimator<FourBitLabels> estimator_;
  std::vector<Layer> layers_;
};

class HShareIndex : public PromptIndex {
 public:
  explicit HShareIndex(const BaselineContext& context) : labels_(HeavyChannelLabels(context)) {
    const Prompt& prompt = *context.prompt;
    TokenBudget overlap = context.overlap;
    overlap.mass_limit = 0.0F;
    const std::vector<uint32_t> layers = ChoosingLayers(prompt);
    std::vector<Choices> choices(prompt.heads.size());
    ForEachIndex(ChoosingHeads(prompt), context.threads,
                 [&](uint32_t head) { choices[head] = ChoicesOf(prompt, labels_, head, overlap); });
    maps_ = LearnMaps(prompt.shape, layers, choices);
  }
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<HShare>(labels_, maps_, budget);
  }

 private:
  const LabelIndex<FourBitLabels> labels_;
  Maps maps_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewHShare(const BaselineContext& context) {
  return std::make_unique<HShareIndex>(context);
}

}  // namespace kvservice::baselines
