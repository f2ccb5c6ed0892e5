// The index of methods that scan labels with every step and do nothing else.

#ifndef KVSERVICE_SELECTOR_BASELINES_LABEL_SCAN_INDEX_H_
#define KVSERVICE_SELECTOR_BASELINES_LABEL_SCAN_INDEX_H_

#include <memory>
#include <utility>

#include "selector/baselines/baselines.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/label_index.h"

namespace kvservice::baselines {

template <typename Store>
class LabelScanIndex : public PromptIndex {
 public:
  explicit LabelScanIndex(LabelIndex<Store> labels) : labels_(std::move(labels)) {}
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return NewScanBaseline(labels_.shape(), budget,
                           std::make_unique<LabelEstimator<Store>>(labels_));
  }

 private:
  const LabelIndex<Store> labels_;
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_LABEL_SCAN_INDEX_H_
