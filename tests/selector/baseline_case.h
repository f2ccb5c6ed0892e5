// Prompts and decode steps whose numbers a test sets: the data behind the spans of
// selector/baselines/baseline.h.

#ifndef KVSERVICE_TESTS_SELECTOR_BASELINE_CASE_H_
#define KVSERVICE_TESTS_SELECTOR_BASELINE_CASE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"

namespace kvservice::baselines {

using Positions = std::vector<uint32_t>;

// A prompt whose numbers are all 0 at first, and the sequence that continues it. Outlives what is
// made from it.
class BaselineCase {
 public:
  BaselineCase(const ModelShape& shape, uint32_t length, uint32_t query_count);
  // Normally distributed keys and queries; the attention sums follow from neither, they are
  // uniform in [0, 1).
  static std::unique_ptr<BaselineCase> Random(const ModelShape& shape, uint32_t length,
                                              uint32_t query_count, uint64_t seed);

  // Numbers of one head (layer * kv_head_count + kv_head); set before prompt() is read.
  absl::Span<float> key(uint32_t head, uint32_t token);
  absl::Span<float> query(uint32_t head, uint32_t query, uint32_t group_head);
  absl::Span<float> attention_sum(uint32_t head, uint32_t group_head);

  // Shares nothing: the spans point into this case.
  std::shared_ptr<const Prompt> prompt() const;

  // One step of one layer. q: [query_head_count][head_dim]; new_keys: [kv_head_count][head_dim].
  // The logits follow from all keys so far. Valid until the next call.
  Step Decode(uint32_t layer, std::vector<float> q, std::vector<float> new_keys);

 private:
  const ModelShape shape_;
  const uint32_t length_;
  const uint32_t query_count_;
  std::vector<std::vector<float>> keys_;     // Per head, of the prompt.
  std::vector<std::vector<float>> decoded_;  // Per head, keys of what was appended.
  std::vector<std::vector<float>> queries_;
  std::vector<std::vector<float>> sums_;
  std::vector<float> q_;
  std::vector<float> new_keys_;
  std::vector<float> logits_;
};

// A step for methods that read logits only: what is to come out of the softmax, one row of
// [length] per query head; the newest token is given what is missing to 1. Outlives its steps.
class LogitsStep {
 public:
  LogitsStep(uint32_t layer, std::vector<std::vector<float>> probabilities);
  Step step() const;

  std::vector<float> q;  // For methods that compare queries.
  std::vector<float> new_keys;

 private:
  uint32_t layer_;
  uint32_t length_;
  std::vector<float> logits_;
};

// [length], 0 but for the tokens named.
std::vector<float> Spread(uint32_t length, const std::map<uint32_t, float>& values);

// The index of a method that must be there.
std::unique_ptr<const PromptIndex> IndexOf(std::string_view method, const BaselineContext& context);

// What `baseline` proposes for a step. cost may be nullptr.
std::vector<Positions> ProposalOf(Baseline* baseline, const Step& step, Cost* cost = nullptr);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_TESTS_SELECTOR_BASELINE_CASE_H_
