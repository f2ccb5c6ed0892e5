// The engine that contenders run on, in this process: one sequence holds the prompt, each contender
// continues a fork of it. Calls wait for their answers.
//
// One object serves one thread.

#ifndef KVSERVICE_TESTS_EVAL_SERVED_PROMPT_H_
#define KVSERVICE_TESTS_EVAL_SERVED_PROMPT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/sketch_table.h"
#include "kvservice/engine.h"
#include "tests/eval/shared_prompt.h"

namespace kvservice::eval {

struct ServedSequence {
  SequenceId id;
  uint64_t generation = 0;
};

class ServedPrompt {
 public:
  struct Options {
    // Contenders that will be forked, and steps that each takes.
    size_t fork_count = 1;
    // Ways of holding the prompt that they are forked from: seeded or not, unrotated or not.
    size_t base_count = 1;
    uint32_t steps_max = 0;
    // Seed of the random numbers that sampled certificates rest on: a study can be repeated.
    uint64_t seed = 1;
  };
  // tables: [layer][kv_head]. Prompt and shape outlive the object.
  static absl::StatusOr<std::unique_ptr<ServedPrompt>> Make(const DecoderShape& shape,
                                                            const SharedPrompt& prompt,
                                                            absl::Span<const SketchTable> tables,
                                                            const Options& options);
  ~ServedPrompt();

  // A sequence that holds the prompt. seeded: with its last queries as samples for anchors;
  // unrotated: of a model whose rotary embedding the service knows.
  absl::StatusOr<ServedSequence> Fork(bool seeded, bool unrotated);
  // Runs and waits. OK only if every row is.
  absl::Status Attend(AttendCall* call);
  // Scans that were made for anchors out of the prompt's queries.
  absl::StatusOr<uint64_t> CountSeedScans(const ServedSequence& sequence);

 private:
  ServedPrompt(const DecoderShape& shape, const SharedPrompt& prompt);
  absl::StatusOr<ServedSequence> MakeBase(bool seeded, bool unrotated);
  absl::Status AppendLayer(const ServedSequence& sequence, uint32_t layer, bool seeded);

  const DecoderShape& shape_;
  const SharedPrompt& prompt_;
  std::unique_ptr<Random> random_;
  std::unique_ptr<Engine> engine_;
  // [seeded][unrotated], made when first asked for.
  struct Base {
    bool is_made = false;
    ServedSequence sequence;
  };
  Base bases_[2][2];
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_SERVED_PROMPT_H_
