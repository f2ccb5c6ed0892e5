#include "tests/eval/shared_prompt.h"

#include <cstring>
#include <utility>

#include "attention/float16.h"
#include "attention/sketch_learning.h"
#include "tests/eval/contender.h"

namespace kvservice::eval {
namespace {

std::vector<float> Widen(const uint16_t* bits, size_t count) {
  std::vector<float> floats(count);
  for (size_t i = 0; i < count; ++i) floats[i] = FloatFromBfloat16(bits[i]);
  return floats;
}

baselines::ModelShape BaselineShape(const DecoderShape& shape) {
  return {.layer_count = shape.layer_count,
          .query_head_count = shape.query_head_count,
          .kv_head_count = shape.kv_head_count,
          .head_dim = shape.head_dim,
          .scale = shape.scale};
}

// The queries of one KV head's group, out of those of all query heads.
std::vector<float> GroupQueries(const DecoderShape& shape, const PromptLayer& layer,
                                uint32_t kv_head, uint32_t query_count) {
  const size_t group = shape.query_head_count / shape.kv_head_count;
  const size_t group_floats = group * shape.head_dim;
  std::vector<float> queries(query_count * group_floats);
  for (size_t i = 0; i < query_count; ++i) {
    const float* all = &layer.queries[i * shape.query_head_count * shape.head_dim];
    std::memcpy(&queries[i * group_floats], all + kv_head * group_floats,
                group_floats * sizeof(float));
  }
  return queries;
}

}  // namespace

bool IsSparse(const DecoderShape& shape, uint32_t layer) {
  return layer >= kStudyDenseLayers && shape.windows[layer] == 0;
}

KvLayout LayoutOf(const DecoderShape& shape) {
  return {.query_head_count = shape.query_head_count,
          .kv_head_count = shape.kv_head_count,
          .head_dim = shape.head_dim,
          .dtype = DType::kBfloat16};
}

SharedPrompt::SharedPrompt(const DecoderShape& shape, PromptCache cache)
    : kv_head_count_(shape.kv_head_count), cache_(std::move(cache)) {
  const size_t length = cache_.tokens.size();
  const size_t head_floats = length * shape.head_dim;
  const size_t group = shape.query_head_count / shape.kv_head_count;
  baseline_prompt_.shape = BaselineShape(shape);
  baseline_prompt_.length = static_cast<uint32_t>(length);
  baseline_prompt_.query_count = cache_.query_count;
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) {
    if (IsSparse(shape, layer)) baseline_prompt_.layers.push_back(layer);
  }
  const size_t heads = cache_.layers.size() * kv_head_count_;
  keys_.resize(heads);
  values_.resize(heads);
  queries_.resize(heads);
  baseline_prompt_.heads.resize(heads);
  for (const uint32_t index : baseline_prompt_.layers) {
    const PromptLayer& layer = cache_.layers[index];
    for (uint32_t head = 0; head < kv_head_count_; ++head) {
      const size_t at = size_t{index} * kv_head_count_ + head;
      keys_[at] = Widen(&layer.k[head * head_floats], head_floats);
      values_[at] = Widen(&layer.v[head * head_floats], head_floats);
      queries_[at] = GroupQueries(shape, layer, head, cache_.query_count);
      baseline_prompt_.heads[at] = {
          .keys = keys_[at],
          .queries = queries_[at],
          .attention_sum = absl::MakeConstSpan(layer.attention_sum)
                               .subspan(head * group * length, group * length)};
    }
  }
}

std::shared_ptr<const baselines::Prompt> SharedPrompt::BaselinePrompt(
    std::shared_ptr<const SharedPrompt> prompt) {
  const baselines::Prompt* seen = &prompt->baseline_prompt_;
  return {std::move(prompt), seen};
}

std::vector<SketchTable> LearnPromptTables(const DecoderShape& shape, const PromptCache& prompt) {
  const KvLayout layout = LayoutOf(shape);
  const size_t length = prompt.tokens.size();
  std::vector<SketchTable> tables;
  std::vector<std::byte> rows(size_t{kBlockTokens} * layout.row_bytes());
  for (size_t index = 0; index < prompt.layers.size(); ++index) {
    const PromptLayer& layer = prompt.layers[index];
    for (uint32_t head = 0; head < shape.kv_head_count; ++head) {
      if (shape.windows[index] != 0) {
        tables.push_back(IdentitySketchTable(shape.head_dim));
        continue;
      }
      SketchStatistics statistics(shape.head_dim);
      const std::vector<float> queries = GroupQueries(shape, layer, head, prompt.query_count);
      for (size_t i = 0; i + shape.head_dim <= queries.size(); i += shape.head_dim) {
        // Finite: a decoder made it.
        (void)statistics.AddQuery(&queries[i]);
      }
      for (size_t block = 0; block < length / kBlockTokens; ++block) {
        for (size_t token = 0; token < kBlockTokens; ++token) {
          const size_t at = (head * length + block * kBlockTokens + token) * shape.head_dim;
          std::memcpy(&rows[token * layout.row_bytes()], &layer.k[at], layout.vector_bytes());
        }
        statistics.AddPage(layout, rows.data(), block == 0 ? (uint64_t{1} << kSketchSinks) - 1 : 0);
      }
      tables.push_back(LearnSketchTable(statistics));
    }
  }
  return tables;
}

}  // namespace kvservice::eval
