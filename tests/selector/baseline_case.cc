#include "tests/selector/baseline_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

namespace kvservice::baselines {

BaselineCase::BaselineCase(const ModelShape& shape, uint32_t length, uint32_t query_count)
    : shape_(shape), length_(length), query_count_(query_count) {
  const size_t heads = size_t{shape.layer_count} * shape.kv_head_count;
  keys_.resize(heads, std::vector<float>(size_t{length} * shape.head_dim, 0.0F));
  decoded_.resize(heads);
  queries_.resize(heads,
                  std::vector<float>(size_t{query_count} * shape.group() * shape.head_dim, 0.0F));
  sums_.resize(heads, std::vector<float>(size_t{shape.group()} * length, 0.0F));
}

std::unique_ptr<BaselineCase> BaselineCase::Random(const ModelShape& shape, uint32_t length,
                                                   uint32_t query_count, uint64_t seed) {
  auto made = std::make_unique<BaselineCase>(shape, length, query_count);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  for (auto* rows : {&made->keys_, &made->queries_}) {
    for (std::vector<float>& row : *rows) {
      std::generate(row.begin(), row.end(), [&] { return normal(random); });
    }
  }
  for (std::vector<float>& row : made->sums_) {
    std::generate(row.begin(), row.end(), [&] { return uniform(random); });
  }
  return made;
}

absl::Span<float> BaselineCase::key(uint32_t head, uint32_t token) {
  return absl::MakeSpan(keys_[head]).subspan(size_t{token} * shape_.head_dim, shape_.head_dim);
}

absl::Span<float> BaselineCase::query(uint32_t head, uint32_t query, uint32_t group_head) {
  const size_t row = size_t{query} * shape_.group() + group_head;
  return absl::MakeSpan(queries_[head]).subspan(row * shape_.head_dim, shape_.head_dim);
}

absl::Span<float> BaselineCase::attention_sum(uint32_t head, uint32_t group_head) {
  return absl::MakeSpan(sums_[head]).subspan(size_t{group_head} * length_, length_);
}

std::shared_ptr<const Prompt> BaselineCase::prompt() const {
  auto prompt = std::make_shared<Prompt>();
  prompt->shape = shape_;
  prompt->length = length_;
  prompt->query_count = query_count_;
  for (size_t head = 0; head < keys_.size(); ++head) {
    const auto keys = absl::MakeConstSpan(keys_[head]).first(size_t{length_} * shape_.head_dim);
    prompt->heads.push_back({keys, queries_[head], sums_[head]});
  }
  return prompt;
}

Step BaselineCase::Decode(uint32_t layer, std::vector<float> q, std::vector<float> new_keys) {
  q_ = std::move(q);
  new_keys_ = std::move(new_keys);
  logits_.clear();
  const uint32_t d = shape_.head_dim;
  uint32_t length = 0;
  for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
    const uint32_t head = layer * shape_.kv_head_count + kv_head;
    std::vector<float>& decoded = decoded_[head];
    const auto new_key = absl::MakeConstSpan(new_keys_).subspan(size_t{kv_head} * d, d);
    decoded.insert(decoded.end(), new_key.begin(), new_key.end());
    length = length_ + static_cast<uint32_t>(decoded.size() / d);
    for (uint32_t h = 0; h < shape_.group(); ++h) {
      const float* const query = q_.data() + size_t{kv_head * shape_.group() + h} * d;
      for (uint32_t token = 0; token < length; ++token) {
        const float* const key = token < length_ ? keys_[head].data() + size_t{token} * d
                                                 : decoded.data() + size_t{token - length_} * d;
        logits_.push_back(shape_.scale * std::inner_product(query, query + d, key, 0.0F));
      }
    }
  }
  return {.layer = layer, .length = length, .q = q_, .new_keys = new_keys_, .logits = logits_};
}

LogitsStep::LogitsStep(uint32_t layer, std::vector<std::vector<float>> probabilities)
    : layer_(layer), length_(static_cast<uint32_t>(probabilities[0].size())) {
  for (std::vector<float>& row : probabilities) {
    EXPECT_EQ(row.size(), length_);
    const float sum = std::accumulate(row.begin(), row.end(), 0.0F);
    EXPECT_LT(sum, 1.0F);
    row.back() += 1.0F - sum;
    std::transform(row.begin(), row.end(), std::back_inserter(logits_),
                   [](float p) { return std::log(std::max(p, 1e-20F)); });
  }
}

Step LogitsStep::step() const {
  return {.layer = layer_, .length = length_, .q = q, .new_keys = new_keys, .logits = logits_};
}

std::vector<float> Spread(uint32_t length, const std::map<uint32_t, float>& values) {
  std::vector<float> row(length, 0.0F);
  for (const auto& [token, value] : values) row[token] = value;
  return row;
}

std::unique_ptr<const PromptIndex> IndexOf(std::string_view method,
                                           const BaselineContext& context) {
  absl::StatusOr<std::unique_ptr<const PromptIndex>> index = NewPromptIndex(method, context);
  EXPECT_TRUE(index.ok()) << index.status();
  return index.ok() ? *std::move(index) : nullptr;
}

std::vector<Positions> ProposalOf(Baseline* baseline, const Step& step, Cost* cost) {
  std::vector<Positions> positions = {{0, 0, 0}};  // To be cleared.
  const Cost own = baseline->Propose(step, &positions);
  if (cost != nullptr) *cost = own;
  return positions;
}

}  // namespace kvservice::baselines
