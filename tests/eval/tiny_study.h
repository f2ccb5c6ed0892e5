// A closed-loop study of a tiny random model, for tests: five layers, of which 2 and 4 are sparse
// and 3 has a window.

#ifndef KVSERVICE_TESTS_EVAL_TINY_STUDY_H_
#define KVSERVICE_TESTS_EVAL_TINY_STUDY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "tests/eval/closed_loop.h"

namespace kvservice::eval {

inline constexpr uint32_t kTinyQueryHeads = 4;
inline constexpr uint32_t kTinyKvHeads = 2;
inline constexpr uint32_t kTinyHeadDim = 64;
inline constexpr uint32_t kTinyVocabulary = 40;
inline constexpr uint32_t kTinySparseLayers = 2;
inline constexpr uint32_t kTinyPromptTokens = 400;

class TinyStudy {
 public:
  // Writes the model into `folder`.
  explicit TinyStudy(const std::string& folder);

  const Decoder& decoder() const { return *decoder_; }
  // A text of the study: its prompt, then `forced`.
  StudyText Text(std::vector<uint32_t> forced, uint32_t greedy_tokens) const;
  // Judged and compared at every step. Borrows the text and the study.
  LoopSetup SetUp(const StudyText& text) const;
  // Logits after prompt + `continuation`, by dense prefill of all of it.
  std::vector<float> LogitsAfter(absl::Span<const uint32_t> continuation) const;
  // The likeliest token there.
  uint32_t Predict(absl::Span<const uint32_t> continuation) const;

 private:
  std::unique_ptr<Decoder> decoder_;
  std::vector<uint32_t> prompt_tokens_;
  std::shared_ptr<const SharedPrompt> prompt_, calibration_;
  std::vector<SketchTable> tables_;
};

std::vector<uint32_t> RandomTokens(uint32_t count, uint32_t seed);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_TINY_STUDY_H_
