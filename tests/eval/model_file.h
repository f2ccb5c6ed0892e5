// The weights of a decoder in memory, and the file they come from (format: export_model.py).

#ifndef KVSERVICE_TESTS_EVAL_MODEL_FILE_H_
#define KVSERVICE_TESTS_EVAL_MODEL_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/eval/decoder.h"

namespace kvservice::eval {

// Matrices are [out][in], row after row; those that stack several projections have them in the
// order of their name.
struct LayerWeights {
  std::vector<float> attention_norm;     // [hidden]
  std::vector<float> qkv;                // [(query_heads + 2 kv_heads) head_dim][hidden]
  std::vector<float> q_norm, k_norm;     // [head_dim]; Gemma 3 only, as below
  std::vector<float> output;             // [hidden][query_heads head_dim]
  std::vector<float> post_attention;     // [hidden]
  std::vector<float> feed_forward_norm;  // [hidden]
  std::vector<float> gate_up;            // [2 feed_forward][hidden]
  std::vector<float> down;               // [hidden][feed_forward]
  std::vector<float> post_feed_forward;  // [hidden]
};

struct ModelWeights {
  DecoderShape shape;
  uint64_t fingerprint = 0;
  std::vector<float> embedding;    // [vocabulary][hidden]
  std::vector<float> output_norm;  // [hidden]
  std::vector<LayerWeights> layers;
};

// NOT_FOUND, or INVALID_ARGUMENT naming what cannot be: the file may hold anything.
absl::StatusOr<std::unique_ptr<const ModelWeights>> ReadModelFile(const std::string& path);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_MODEL_FILE_H_
