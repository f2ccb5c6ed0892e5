// Exact attention of contenders that share a prompt: every key scored in float32, at each step of
// each layer. What selections are judged by, and where proposers that score every key get
// their scores.
//
// One object serves one thread.

#ifndef KVSERVICE_TESTS_EVAL_EXACT_ATTENTION_H_
#define KVSERVICE_TESTS_EVAL_EXACT_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "tests/eval/shared_prompt.h"

namespace kvservice::eval {

// The newest tokens of one contender, layer and KV head: [count][head_dim].
struct Tail {
  const float* keys = nullptr;
  const float* values = nullptr;
  uint32_t count = 0;
};

class ExactAttention {
 public:
  ExactAttention(const DecoderShape& shape, const SharedPrompt* prompt, size_t contender_count,
                 uint32_t steps_max);

  // Layers of all functions are sparse ones (IsSparse).

  // Stores a step's keys and values, bf16 bits [contender][kv_head][head_dim], as the layer's
  // newest tokens.
  void Append(uint32_t layer, const uint16_t* k, const uint16_t* v);
  // Scores the queries of some contenders (indices, ascending); q:
  // [contender][query_head][head_dim] of all of them.
  void Score(uint32_t layer, const float* q, absl::Span<const uint32_t> contenders);

  // Tokens of the layer that was appended to last.
  uint32_t length() const { return length_; }
  // scale * q.k, [query_head][length()]; empty if the contender was not scored.
  absl::Span<const float> logits(size_t contender) const {
    if (slots_[contender] == kNotScored) return {};
    const size_t floats = size_t{shape_.query_head_count} * length_;
    return absl::MakeConstSpan(logits_).subspan(slots_[contender] * floats, floats);
  }
  Tail tail(uint32_t layer, size_t contender, uint32_t kv_head) const;
  // Largest norm of a key, rounded up.
  float key_norm_max(uint32_t layer, uint32_t kv_head) const {
    return key_norms_[layer * shape_.kv_head_count + kv_head];
  }

 private:
  static constexpr uint32_t kNotScored = UINT32_MAX;

  // The newest tokens of a layer, [contender][kv_head][steps_max][head_dim]; empty until something
  // is appended to it.
  struct LayerTail {
    uint32_t count = 0;
    std::vector<float> keys, values;
  };

  size_t TailOffset(size_t contender, uint32_t kv_head) const {
    return (contender * shape_.kv_head_count + kv_head) * steps_max_ * shape_.head_dim;
  }

  const DecoderShape shape_;
  const SharedPrompt* const prompt_;
  const size_t contender_count_;
  const size_t steps_max_;
  uint32_t length_ = 0;
  std::vector<LayerTail> tails_;  // [layer]
  std::vector<float> key_norms_;  // [layer][kv_head], of sparse layers
  // Of the contenders that were scored, one after the other.
  std::vector<float> scaled_;    // [slot][query_head][head_dim]
  std::vector<float> logits_;    // [slot][query_head][length]
  std::vector<uint32_t> slots_;  // [contender]
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_EXACT_ATTENTION_H_
