// The closed-loop study: texts, contenders, threads, and one row of results per text and contender.

#ifndef KVSERVICE_TESTS_EVAL_QUALITY_STUDY_H_
#define KVSERVICE_TESTS_EVAL_QUALITY_STUDY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "tests/eval/closed_loop.h"

namespace kvservice::eval {

// Texts of one file that tests/eval/tasks.py wrote. INVALID_ARGUMENT names what is missing.
absl::StatusOr<std::vector<StudyText>> ReadTexts(const std::string& path);

struct QualityOptions {
  uint32_t thread_count = 1;
  // Contenders that run in lockstep: their matrix products share the weights and the prompt's keys.
  uint32_t batch = 128;
  // Folder for prefilled prompts; empty = they are made each time.
  std::string prompt_folder = {};
  // Only the first steps of a text (0 = all).
  uint32_t steps_max = 0;
  uint64_t seed = 1;
};

// Prompts of one model, prefilled once.
class PromptStore {
 public:
  PromptStore(const Decoder* decoder, const QualityOptions& options)
      : decoder_(decoder), options_(options) {}
  absl::StatusOr<std::shared_ptr<const SharedPrompt>> Get(const StudyText& text) const;

 private:
  const Decoder* const decoder_;
  const QualityOptions& options_;
};

// Runs contenders[1..] beside contenders[0], the dense one, in batches on several threads. Results
// are in the order of the contenders.
absl::StatusOr<std::vector<LoopResult>> RunBatches(const QualityOptions& options,
                                                   const LoopSetup& setup,
                                                   absl::Span<const Contender> contenders);

// One row per contender: what it did on a text, compared with the first, which is dense.
std::vector<nlohmann::ordered_json> MakeRows(const LoopSetup& setup,
                                             absl::Span<const Contender> contenders,
                                             absl::Span<const LoopResult> results);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_QUALITY_STUDY_H_
