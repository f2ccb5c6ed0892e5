// A prompt that many contenders continue: keys and values of its sparse layers widened once, in the
// two forms that the study needs. Immutable; shared by all threads.

#ifndef KVSERVICE_TESTS_EVAL_SHARED_PROMPT_H_
#define KVSERVICE_TESTS_EVAL_SHARED_PROMPT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "attention/kv_layout.h"
#include "attention/sketch_table.h"
#include "selector/baselines/baseline.h"
#include "tests/eval/decoder.h"

namespace kvservice::eval {

class SharedPrompt {
 public:
  SharedPrompt(const DecoderShape& shape, PromptCache cache);
  // Spans of baseline_prompt() point into the object.
  SharedPrompt(const SharedPrompt&) = delete;
  SharedPrompt& operator=(const SharedPrompt&) = delete;

  const PromptCache& cache() const { return cache_; }
  uint32_t length() const { return static_cast<uint32_t>(cache_.tokens.size()); }
  // [length][head_dim] float32. Require a sparse layer.
  const float* keys(uint32_t layer, uint32_t kv_head) const {
    return keys_[layer * kv_head_count_ + kv_head].data();
  }
  const float* values(uint32_t layer, uint32_t kv_head) const {
    return values_[layer * kv_head_count_ + kv_head].data();
  }
  // What baselines see; shares the object's life.
  static std::shared_ptr<const baselines::Prompt> BaselinePrompt(
      std::shared_ptr<const SharedPrompt> prompt);

 private:
  const uint32_t kv_head_count_;
  PromptCache cache_;
  // Empty where the layer is not sparse.
  std::vector<std::vector<float>> keys_, values_;  // [layer * kv_head]
  std::vector<std::vector<float>> queries_;        // [layer * kv_head][query][group][head_dim]
  baselines::Prompt baseline_prompt_;
};

// One sketch table per layer and KV head, layer-major, from a prompt's last queries and all its
// full pages. Of layers with a window, which nobody scans, the identity.
std::vector<SketchTable> LearnPromptTables(const DecoderShape& shape, const PromptCache& prompt);

// Whether contenders differ in a layer: it is none that all of them read whole, nor one with a
// window.
bool IsSparse(const DecoderShape& shape, uint32_t layer);

KvLayout LayoutOf(const DecoderShape& shape);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_SHARED_PROMPT_H_
