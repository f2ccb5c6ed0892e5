// Closed-loop decoding of one text by several contenders at once. Every contender's sparse outputs
// feed its own next layers and steps; the dense one (always the first) is what the others are
// compared with.

#ifndef KVSERVICE_TESTS_EVAL_CLOSED_LOOP_H_
#define KVSERVICE_TESTS_EVAL_CLOSED_LOOP_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/sketch_table.h"
#include "selector/baselines/baselines.h"
#include "tests/eval/contender.h"
#include "tests/eval/decoder.h"
#include "tests/eval/shared_prompt.h"

namespace kvservice::eval {

// Tokens [begin, end) of the forced continuation that answer a question.
struct Answer {
  uint32_t begin = 0;
  uint32_t end = 0;
  std::string name;
};

struct StudyText {
  std::string name;  // of the text and what is done with it
  std::string model;
  std::string text;              // "prose", "code", "needles", ...
  uint32_t tokens = 0;           // its nominal length
  std::vector<uint32_t> prompt;  // prefilled densely
  // Fed one by one, whatever a contender would have said.
  std::vector<uint32_t> forced;
  std::vector<Answer> answers = {};
  // After the prompt's and the forced tokens: steps in which each contender goes on by itself.
  uint32_t greedy_tokens = 0;
};

struct LoopSetup {
  const Decoder* decoder = nullptr;
  std::shared_ptr<const SharedPrompt> prompt;
  // Of another text of the same model, for what a method learns beforehand.
  std::shared_ptr<const SharedPrompt> calibration;
  absl::Span<const SketchTable> tables;
  // What published methods computed from the prompt, by name; of all that take part.
  const std::map<std::string, std::unique_ptr<const baselines::PromptIndex>>* indexes = nullptr;
  const StudyText* text = nullptr;
  // Selections are judged at every so many steps, those that carry a proof at all; and at every so
  // many of the judged steps outputs and oracles are compared.
  uint32_t judge_every = 4;
  uint32_t compare_every = 2;
  uint64_t seed = 1;
};

// What one contender did. Vectors over steps are in the order of steps; sums are over KV heads of
// the layers that are not dense for everybody ("sparse layers").
struct LoopResult {
  uint32_t steps = 0;
  uint64_t groups = 0;  // (step, sparse layer, KV head)
  uint64_t groups_second_half = 0;
  uint64_t scans = 0;
  uint64_t scans_second_half = 0;
  uint64_t seed_scans = 0;
  uint64_t groups_dense = 0;
  double tokens_read = 0.0;
  double tokens_visible = 0.0;
  double bytes = 0.0;
  double bytes_dense = 0.0;
  double flops = 0.0;
  double flops_dense = 0.0;

  // Per (judged step, sparse layer, query head): [step][layer][head].
  std::vector<float> dropped;
  // Per (compared step, sparse layer, KV head): [step][layer][head].
  std::vector<float> excess;
  std::vector<float> output_errors;
  double overlap_sum = 0.0;
  // Scans per [sparse layer][KV head].
  std::vector<uint32_t> scans_by_head;

  // Per forced step.
  std::vector<float> kl;   // KL(dense || contender) of the next token's distribution, nats
  std::vector<float> nll;  // of the next forced token
  uint64_t top1_equal = 0;
  uint32_t digits = 0, digits_right = 0;
  uint32_t answers = 0, answers_right = 0;
  std::vector<uint32_t> greedy;

  // Certificates with a statement, by strength of it: always true, or with a stated probability.
  uint64_t certificates = 0, violations = 0;
  uint64_t sampled_certificates = 0, sampled_misses = 0;
  double expected_misses = 0.0;
  std::vector<float> bounds;  // of proven certificates that dropped something
  // (truth, bound) of a few of them.
  std::vector<std::pair<float, float>> bound_samples;
  // Sums of what the theory assumes (excess of CIS, dropped mass of PSAW, excess of ETF), and for
  // how many groups it was told.
  std::array<double, 3> assumed_sum{};
  std::array<uint64_t, 3> assumed_count{};
};

// contenders[0] must be dense. Deterministic for a seed. Steps = forced + greedy_tokens - 1.
absl::StatusOr<std::vector<LoopResult>> RunClosedLoop(const LoopSetup& setup,
                                                      absl::Span<const Contender> contenders);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_CLOSED_LOOP_H_
