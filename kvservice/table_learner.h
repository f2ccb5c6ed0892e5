// Learns sketch tables for a model that was registered without any: gathers samples of prompt
// queries, and when every layer has enough of them and a sequence has enough sealed tokens, learns
// the table of one KV head after the other, and makes them the model's latest version.
//
// A model learns once. Whatever is learnt is valid: a bad sample makes bounds looser, never wrong
// (attention/sketch_learning.h). Samples come from sequences of any tenant; what a table tells of
// them is one norm and at most four directions per KV head of the model.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_TABLE_LEARNER_H_
#define KVSERVICE_KVSERVICE_TABLE_LEARNER_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/sketch_table.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/model_registry.h"

namespace kvservice {

class TableLearner {
 public:
  // Per KV head: queries that suffice, and the most that are kept; tokens of the sequence whose
  // keys tell the ranges, and the most pages of it that are read.
  static constexpr uint32_t kQueriesMin = 64;
  static constexpr uint32_t kQueriesMax = 256;
  static constexpr uint32_t kTokensMin = 512;
  static constexpr uint32_t kPagesMax = 64;

  // Borrowed; outlives the learner.
  explicit TableLearner(const Model* model);

  // Keeps what there is room for. queries: [token_count][query_head_count][head_dim], finite.
  void AddQueries(uint32_t layer, uint32_t token_count, absl::Span<const float> queries);
  // There are queries enough, and the sequence has keys enough.
  bool CanLearnFrom(const Sequence& sequence) const;
  // Learns the next KV head's table from the sequence's keys; true when that was the last one and
  // the model has a new version.
  bool LearnNext(const Sequence& sequence);
  // Forgets tables of another sequence's keys that are not complete.
  void StartOver() { tables_.clear(); }

 private:
  const Model* const model_;
  const uint32_t tokens_min_;
  const uint32_t tokens_max_;
  // [layer_count], each [tokens][query_head_count][head_dim] of at most tokens_max_ tokens.
  std::vector<std::vector<float>> queries_;
  // Learnt so far, in the order of the model's tables.
  std::vector<SketchTable> tables_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TABLE_LEARNER_H_
