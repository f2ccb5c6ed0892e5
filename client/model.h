// The geometry of a model's attention, as the server needs to know it. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_MODEL_H_
#define KVSERVICE_CLIENT_MODEL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/policy.h"
#include "client/tensor.h"

namespace kvservice::client {

// How rotary embeddings pair the channels of a head: not at all, c with c + d/2 (Llama), or 2c with
// 2c + 1.
enum class RotaryStyle : uint8_t { kNone, kHalf, kInterleaved };

struct ModelDescription {
  // Unique on the server; 1 to 128 bytes.
  std::string name = {};
  uint32_t layer_count = 0;
  // A multiple of kv_head_count, at most 16 times it.
  uint32_t query_head_count = 0;
  uint32_t kv_head_count = 0;
  // 64, 80, 96, 128 or 256.
  uint32_t head_dim = 0;
  // Type of the keys and values that are appended.
  DType cache_dtype = DType::kBfloat16;
  // Factor on q.k, usually 1 / sqrt(head_dim).
  float scale = 0.0F;
  // 0 = none; else logits become softcap * tanh(logit / softcap).
  float logit_softcap = 0.0F;
  // [layer_count] tokens, 0 = full attention; empty = full everywhere.
  std::vector<uint32_t> sliding_window_tokens = {};
  RotaryStyle rotary_style = RotaryStyle::kNone;
  // [rotary_dim / 2]; empty without rotation.
  std::vector<float> inverse_frequencies = {};
  // Optional, both or neither; they make sketches tight. [layer_count][kv_head_count][head_dim] and
  // [layer_count][kv_head_count][max(1, head_dim / 64)][head_dim].
  std::vector<float> sketch_metric = {};
  std::vector<float> sketch_directions = {};
  // Used by sequences that bring none.
  std::optional<Policy> default_policy = {};
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_MODEL_H_
