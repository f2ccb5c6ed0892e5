#include "kvservice/table_learner.h"

#include <algorithm>
#include <cstddef>

#include "attention/sketch_learning.h"

namespace kvservice {
namespace {

// Tokens of which the query heads of one KV head give `queries`.
uint32_t TokensFor(uint32_t queries, const KvLayout& layout) {
  return (queries + layout.group_size() - 1) / layout.group_size();
}

size_t TokenFloats(const KvLayout& layout) {
  return size_t{layout.query_head_count} * layout.head_dim;
}

// Tokens of block 0 that no sketch covers.
constexpr uint64_t kSinkMask = (uint64_t{1} << kSketchSinks) - 1;

}  // namespace

TableLearner::TableLearner(const Model* model)
    : model_(model),
      tokens_min_(TokensFor(kQueriesMin, model->spec.layout)),
      tokens_max_(TokensFor(kQueriesMax, model->spec.layout)),
      queries_(model->spec.layer_count) {}

void TableLearner::AddQueries(uint32_t layer, uint32_t token_count,
                              absl::Span<const float> queries) {
  std::vector<float>& kept = queries_[layer];
  const size_t token_floats = TokenFloats(model_->spec.layout);
  const size_t room = tokens_max_ - kept.size() / token_floats;
  const size_t taken = std::min<size_t>(room, token_count) * token_floats;
  kept.insert(kept.end(), queries.begin(), queries.begin() + static_cast<ptrdiff_t>(taken));
}

bool TableLearner::CanLearnFrom(const Sequence& sequence) const {
  if (sequence.length_min() < kTokensMin) return false;
  const size_t floats_min = tokens_min_ * TokenFloats(model_->spec.layout);
  return std::all_of(queries_.begin(), queries_.end(),
                     [&](const auto& of_layer) { return of_layer.size() >= floats_min; });
}

bool TableLearner::LearnNext(const Sequence& sequence) {
  const KvLayout& layout = model_->spec.layout;
  const auto layer = static_cast<uint32_t>(tables_.size() / layout.kv_head_count);
  const auto kv_head = static_cast<uint32_t>(tables_.size() % layout.kv_head_count);
  SketchStatistics statistics(layout.head_dim);
  const std::vector<float>& queries = queries_[layer];
  const size_t group_floats = size_t{layout.group_size()} * layout.head_dim;
  for (size_t token = 0; token < queries.size(); token += TokenFloats(layout)) {
    const float* query = queries.data() + token + kv_head * group_floats;
    for (uint32_t head = 0; head < layout.group_size(); ++head, query += layout.head_dim) {
      // Finite: checked when they came.
      statistics.AddQuery(query).IgnoreError();
    }
  }
  std::vector<std::byte> rows(size_t{kBlockTokens} * layout.row_bytes());
  const uint32_t page_count = sequence.length_min() / kBlockTokens;
  const uint32_t step = (page_count + kPagesMax - 1) / kPagesMax;
  for (uint32_t page = 0; page < page_count; page += step) {
    sequence.ReadRows(layer, page, kv_head, rows.data());
    statistics.AddPage(layout, rows.data(), page == 0 ? kSinkMask : 0);
  }
  tables_.push_back(LearnSketchTable(statistics));
  if (tables_.size() < size_t{model_->spec.layer_count} * layout.kv_head_count) return false;
  model_->tables->Add(std::move(tables_));
  return true;
}

}  // namespace kvservice
