#include "selector/baselines/estimator.h"

#include <utility>

#include "selector/baselines/choose.h"
#include "selector/baselines/softmax.h"

namespace kvservice::baselines {
namespace {

class ScanBaseline : public Baseline {
 public:
  ScanBaseline(const ModelShape& shape, const TokenBudget& budget,
               std::unique_ptr<Estimator> estimator)
      : shape_(shape), budget_(budget), estimator_(std::move(estimator)) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    Cost cost = AppendKeys(step, shape_, estimator_.get());
    std::vector<float> probabilities;
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      EstimateProbabilities(step, shape_, *estimator_, kv_head, &probabilities);
      KeepForGroup(probabilities, shape_.group(), step.length, budget_, &(*positions)[kv_head]);
      Add(estimator_->EstimateCost(step.length), &cost);
    }
    return cost;
  }

 private:
  const ModelShape shape_;
  const TokenBudget budget_;
  const std::unique_ptr<Estimator> estimator_;
};

}  // namespace

void Add(const Cost& more, Cost* cost) {
  cost->heads_scanned += more.heads_scanned;
  cost->bytes += more.bytes;
  cost->flops += more.flops;
}

absl::Span<const float> QueriesOf(const Step& step, const ModelShape& shape, uint32_t kv_head) {
  const size_t numbers = size_t{shape.group()} * shape.head_dim;
  return step.q.subspan(kv_head * numbers, numbers);
}

absl::Span<const float> NewKeyOf(const Step& step, const ModelShape& shape, uint32_t kv_head) {
  return step.new_keys.subspan(size_t{kv_head} * shape.head_dim, shape.head_dim);
}

Cost AppendKeys(const Step& step, const ModelShape& shape, Estimator* estimator) {
  Cost cost;
  for (uint32_t kv_head = 0; kv_head < shape.kv_head_count; ++kv_head) {
    estimator->Append(step.layer * shape.kv_head_count + kv_head, NewKeyOf(step, shape, kv_head));
    Add(estimator->AppendCost(), &cost);
  }
  return cost;
}

void EstimateProbabilities(const Step& step, const ModelShape& shape, const Estimator& estimator,
                           uint32_t kv_head, std::vector<float>* probabilities) {
  probabilities->resize(size_t{shape.group()} * step.length);
  estimator.Estimate(step.layer * shape.kv_head_count + kv_head, QueriesOf(step, shape, kv_head),
                     absl::MakeSpan(*probabilities));
  SoftmaxRows(absl::MakeSpan(*probabilities), shape.group());
}

std::unique_ptr<Baseline> NewScanBaseline(const ModelShape& shape, const TokenBudget& budget,
                                          std::unique_ptr<Estimator> estimator) {
  return std::make_unique<ScanBaseline>(shape, budget, std::move(estimator));
}

}  // namespace kvservice::baselines
