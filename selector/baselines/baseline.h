// Published methods of choosing tokens that we compare with. Each proposes positions from host
// copies of keys and queries; the positions then run through the `given` path, so that every method
// is attended, judged and paid for in the same way. They exist for measurements (tests/eval), not
// for serving: none of them can say what it left out.
//
// Adding one: write <name>.cc with a New<Name> function, declare it in baselines.h and add one line
// to the table in baselines.cc. One proposer serves one sequence; any thread, one at a time. What
// follows from the prompt alone is computed once per prompt (PromptIndex) and shared by proposers
// on all threads.
//
// Sources are named in each file; parameters that a paper leaves open are the defaults of its code.

#ifndef KVSERVICE_SELECTOR_BASELINES_BASELINE_H_
#define KVSERVICE_SELECTOR_BASELINES_BASELINE_H_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace kvservice::baselines {

// Geometry of a model's attention. Query head h belongs to KV head h / group().
struct ModelShape {
  uint32_t layer_count = 0;
  uint32_t query_head_count = 0;
  uint32_t kv_head_count = 0;
  uint32_t head_dim = 0;
  float scale = 1.0F;  // logit = scale * q.k, q and k rotated
  uint32_t group() const { return query_head_count / kv_head_count; }
};

// Tokens per KV head. Sinks [0, sink) and the last `local` tokens are always read and are not
// proposed; of the middle a method keeps `top_k` tokens, or, with mass_limit > 0, the fewest with
// which its own estimate of the dropped mass of every query head is at most mass_limit (methods
// without an estimate keep top_k).
struct TokenBudget {
  uint32_t sink = 8;
  uint32_t local = 32;
  uint32_t top_k = 0;
  float mass_limit = 0.0F;
};

// A finished prompt of one sequence: what dense prefill computed. Immutable, shared.
struct PromptHead {
  // [length][head_dim], rotated, as the cache holds them (widened to float32).
  absl::Span<const float> keys;
  // [query_count][group][head_dim]: the last prompt queries, rotated, oldest first.
  absl::Span<const float> queries;
  // [group][length]: softmax attention summed over all prompt queries.
  absl::Span<const float> attention_sum;
};
struct Prompt {
  ModelShape shape;
  uint32_t length = 0;
  uint32_t query_count = 0;
  // [layer_count * kv_head_count], layer-major.
  std::vector<PromptHead> heads;
  // The layers that methods choose for, ascending; empty = all. The others are read whole: Propose
  // is not called for them, and nobody looks at their heads, which may be empty.
  std::vector<uint32_t> layers;
  const PromptHead& head(uint32_t layer, uint32_t kv_head) const {
    return heads[layer * shape.kv_head_count + kv_head];
  }
};

// One decode step of one layer. Spans are valid during the call.
struct Step {
  uint32_t layer = 0;
  // Tokens attended, the newest included; its position is length - 1.
  uint32_t length = 0;
  // [query_head_count][head_dim], rotated.
  absl::Span<const float> q;
  // [kv_head_count][head_dim], rotated: the newest token's.
  absl::Span<const float> new_keys;
  // [query_head_count][length], scale * q.k of every key. A harness that judges has them anyway;
  // only a method that scores every key exactly may read them (it pays for that in Cost), and
  // methods that accumulate attention may read those of the tokens that they keep.
  absl::Span<const float> logits;
};

// What one step of one layer cost, over all KV heads. Reading the proposed rows themselves is
// counted by the harness, alike for all methods.
struct Cost {
  // KV heads that looked at every token (in whatever precision) to choose.
  uint32_t heads_scanned = 0;
  // Bytes of keys, labels, sketches or summaries read to choose. Keys count 2 bytes per channel.
  double bytes = 0.0;
  // Multiplications and additions to choose (2 per channel and query head of a dot product).
  double flops = 0.0;
};

class Baseline {
 public:
  virtual ~Baseline() = default;
  // Called for every layer of Prompt::layers in order, then for the next token; the first step has
  // length prompt length + 1, and each has one more than the one before. positions:
  // [kv_head_count], filled with ascending unique positions in [sink, length - local); clears what
  // was there.
  virtual Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) = 0;
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_BASELINE_H_
