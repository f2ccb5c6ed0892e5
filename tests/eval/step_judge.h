// Judges what one contender did for one KV head in one step, against exact attention.

#ifndef KVSERVICE_TESTS_EVAL_STEP_JUDGE_H_
#define KVSERVICE_TESTS_EVAL_STEP_JUDGE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "tests/eval/exact_attention.h"

namespace kvservice::eval {

// One KV head of one step. Pointers are borrowed.
struct GroupStep {
  uint32_t group = 1;
  uint32_t head_dim = 0;
  uint32_t length = 0;
  float scale = 1.0F;
  const float* q = nullptr;       // [group][head_dim]
  const float* logits = nullptr;  // [group][length]
  // The prompt's [prompt_length][head_dim], then the newest tokens.
  const float* prompt_keys = nullptr;
  const float* prompt_values = nullptr;
  uint32_t prompt_length = 0;
  Tail tail;
  float key_norm_max = 0.0F;
  // Attended positions, ascending; ignored when dense.
  absl::Span<const uint32_t> selected;
  bool dense = false;
  const float* out = nullptr;                     // [group][head_dim]
  const HeadCertificate* certificates = nullptr;  // [group]
};

// Of one query head.
struct HeadVerdict {
  double dropped = 0.0;
  // A statement of its certificate is wrong: compared without tolerance, in long double where
  // float32 cannot tell.
  bool is_wrong = false;
};

// Of one KV head, made only where asked for: it costs a selection and a product with all values.
struct GroupVerdict {
  // Dropped mass beyond that of the best set of the same size for the group (largest sum of
  // probabilities), mean over the group; share of the selected tokens that are in that set.
  double excess = 0.0;
  double overlap = 1.0;
  // ||out - dense|| / ||dense||, mean over the group.
  double output_error = 0.0;
};

class StepJudge {
 public:
  // Fills verdicts [group]. Keeps the step's probabilities for Compare.
  void Judge(const GroupStep& step, HeadVerdict* verdicts);
  // After Judge of the same step.
  GroupVerdict Compare(const GroupStep& step, const HeadVerdict* verdicts);

 private:
  void Normalise(const GroupStep& step);

  std::vector<float> probabilities_;  // [group][length]
  std::vector<float> sums_;           // [length]
  std::vector<uint32_t> order_;
  std::vector<uint8_t> is_selected_;
  std::vector<float> dense_out_;
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_STEP_JUDGE_H_
