// Labels of a prompt's keys, shared, and the estimator that completes them with the labels of what
// a sequence appends.

#ifndef KVSERVICE_SELECTOR_BASELINES_LABEL_INDEX_H_
#define KVSERVICE_SELECTOR_BASELINES_LABEL_INDEX_H_

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baseline.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/for_each_index.h"

namespace kvservice::baselines {

// How a key or query becomes a label, linearly: some channels of it, or some of its components.
struct Projection {
  uint32_t channels = 0;  // Of a label.
  // vector: [head_dim] of KV head `head`; label: [channels]. Any thread.
  std::function<void(uint32_t head, absl::Span<const float> vector, absl::Span<float> label)> apply;
  double flops = 0.0;  // Of one call.
};

// Store: FourBitLabels or HalfLabels. Immutable; any thread.
template <typename Store>
class LabelIndex {
 public:
  LabelIndex(const Prompt& prompt, Projection projection, uint32_t threads)
      : shape_(prompt.shape),
        projection_(std::move(projection)),
        stores_(prompt.heads.size(), Store(projection_.channels)) {
    ForEachIndex(ChoosingHeads(prompt), threads, [&](uint32_t head) {
      stores_[head].Reserve(prompt.length);
      for (uint32_t token = 0; token < prompt.length; ++token) {
        const size_t begin = size_t{token} * shape_.head_dim;
        stores_[head].Append(
            LabelOf(head, prompt.heads[head].keys.subspan(begin, shape_.head_dim)));
      }
    });
  }

  const ModelShape& shape() const { return shape_; }
  const Projection& projection() const { return projection_; }
  const Store& store(uint32_t head) const { return stores_[head]; }

  std::vector<float> LabelOf(uint32_t head, absl::Span<const float> vector) const {
    std::vector<float> label(projection_.channels);
    projection_.apply(head, vector, absl::MakeSpan(label));
    return label;
  }
  // q: [group][head_dim], scaled labels [group][channels]: their dot products are logits.
  std::vector<float> QueryLabels(uint32_t head, absl::Span<const float> q) const {
    std::vector<float> labels;
    labels.reserve(size_t{shape_.group()} * projection_.channels);
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      const std::vector<float> label =
          LabelOf(head, q.subspan(size_t{h} * shape_.head_dim, shape_.head_dim));
      std::transform(label.begin(), label.end(), std::back_inserter(labels),
                     [this](float value) { return value * shape_.scale; });
    }
    return labels;
  }

 private:
  const ModelShape shape_;
  const Projection projection_;
  std::vector<Store> stores_;
};

template <typename Store>
class LabelEstimator : public Estimator {
 public:
  // The index outlives it.
  explicit LabelEstimator(const LabelIndex<Store>& index)
      : index_(index),
        tails_(size_t{index.shape().layer_count} * index.shape().kv_head_count,
               Store(index.projection().channels)) {}

  void Append(uint32_t head, absl::Span<const float> key) override {
    tails_[head].Append(index_.LabelOf(head, key));
  }

  void Estimate(uint32_t head, absl::Span<const float> q, absl::Span<float> logits) const override {
    const uint32_t group = index_.shape().group();
    const size_t length = logits.size() / group;
    const Store& prompt = index_.store(head);
    assert(length == prompt.size() + tails_[head].size());
    const std::vector<float> labels = index_.QueryLabels(head, q);
    prompt.Dot(labels, group, logits.data(), length);
    tails_[head].Dot(labels, group, logits.data() + prompt.size(), length);
  }

  Cost AppendCost() const override { return {.flops = index_.projection().flops}; }

  Cost EstimateCost(uint32_t length) const override {
    const Projection& projection = index_.projection();
    const uint32_t group = index_.shape().group();
    return {.heads_scanned = 1,
            .bytes = Store::BytesPerToken(projection.channels) * length,
            .flops = group * (2.0 * projection.channels * length + projection.flops)};
  }

 private:
  const LabelIndex<Store>& index_;
  std::vector<Store> tails_;  // [layer_count * kv_head_count]
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_LABEL_INDEX_H_
