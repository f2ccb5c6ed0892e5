// Estimates of the logits of one sequence's tokens, and the method that most others are: estimate
// every logit, keep the largest.

#ifndef KVSERVICE_SELECTOR_BASELINES_ESTIMATOR_H_
#define KVSERVICE_SELECTOR_BASELINES_ESTIMATOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baseline.h"

namespace kvservice::baselines {

// One sequence; one thread at a time. Heads are numbered layer * kv_head_count + kv_head.
class Estimator {
 public:
  virtual ~Estimator() = default;
  // The key of the newest token, [head_dim], once per step and head, before Estimate.
  virtual void Append(uint32_t head, absl::Span<const float> key) = 0;
  // q: [group][head_dim]. logits: [group][length], scaled like the true ones; length is the number
  // of tokens so far.
  virtual void Estimate(uint32_t head, absl::Span<const float> q,
                        absl::Span<float> logits) const = 0;
  // What one step of one KV head costs: Append always, Estimate where it is called.
  virtual Cost AppendCost() const = 0;
  virtual Cost EstimateCost(uint32_t length) const = 0;
};

void Add(const Cost& more, Cost* cost);

// The step's queries of one KV head, [group][head_dim], and its newest key, [head_dim].
absl::Span<const float> QueriesOf(const Step& step, const ModelShape& shape, uint32_t kv_head);
absl::Span<const float> NewKeyOf(const Step& step, const ModelShape& shape, uint32_t kv_head);

// Gives the estimator every KV head's newest key.
Cost AppendKeys(const Step& step, const ModelShape& shape, Estimator* estimator);

// Estimated softmax of one KV head's tokens: probabilities becomes [group][length]. (An argument,
// so that the heads of a layer use the same memory.)
void EstimateProbabilities(const Step& step, const ModelShape& shape, const Estimator& estimator,
                           uint32_t kv_head, std::vector<float>* probabilities);

// Scores every token with every step and keeps by KeepForGroup.
std::unique_ptr<Baseline> NewScanBaseline(const ModelShape& shape, const TokenBudget& budget,
                                          std::unique_ptr<Estimator> estimator);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_ESTIMATOR_H_
