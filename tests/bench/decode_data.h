// What a decode loop sends: keys, values and queries of some layers of some sequences.

#ifndef KVSERVICE_TESTS_BENCH_DECODE_DATA_H_
#define KVSERVICE_TESTS_BENCH_DECODE_DATA_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/kv_layout.h"
#include "client/client.h"

namespace kvservice::bench {

// Sequences have `prompt_tokens` tokens and then take up to `step_count` steps of one token. One
// thread.
class DecodeData {
 public:
  virtual ~DecodeData() = default;
  const client::ModelDescription& model() const { return model_; }
  const KvLayout& layout() const { return layout_; }
  uint32_t layer_count() const { return model_.layer_count; }
  // False if layer 0 is not a model's first one, which policies treat differently.
  bool begins_at_first_layer() const { return begins_at_first_layer_; }
  uint32_t batch() const { return batch_; }
  uint32_t prompt_tokens() const { return prompt_tokens_; }
  uint32_t step_count() const { return step_count_; }
  // Tokens that fixed budgets keep.
  uint32_t list_tokens() const { return list_tokens_; }
  // For names of cases.
  const std::string& name() const { return name_; }
  size_t token_bytes() const {
    return static_cast<size_t>(layout_.kv_head_count) * layout_.vector_bytes();
  }

  // Keys and values of tokens [first, first + count), [count][kv_head_count][head_dim].
  virtual void Tokens(uint32_t layer, uint32_t sequence, uint32_t first, uint32_t count,
                      std::byte* k, std::byte* v) = 0;
  // Of all sequences, for the token at `position`, which is the prompt's last or a step's:
  // [batch][query_head_count][head_dim].
  virtual std::vector<float> Queries(uint32_t layer, uint32_t position) = 0;

 protected:
  client::ModelDescription model_;
  KvLayout layout_;
  bool begins_at_first_layer_ = false;
  uint32_t batch_ = 1;
  uint32_t prompt_tokens_ = 0;
  uint32_t step_count_ = 0;
  uint32_t list_tokens_ = 0;
  std::string name_;
};

// One layer, 32 query heads and 8 KV heads of 128 channels, bf16, whose queries find .97 of their
// mass on two tokens of a hundred (layer_data.h).
std::unique_ptr<DecodeData> MakePlantedData(uint32_t batch, uint32_t prompt_tokens,
                                            uint32_t step_count, uint32_t list_tokens = 2048);

// All layers of a real model, as tests/eval/trace.py recorded them: the last judged tokens are the
// steps. The sequences of a batch are alike, each in memory of its own. Sketch tables come from the
// trace's sampled queries, which are the prompt's. The errors of ReadTraceHeader.
absl::StatusOr<std::unique_ptr<DecodeData>> MakeTraceData(const std::string& path, uint32_t batch,
                                                          uint32_t step_count);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_DECODE_DATA_H_
