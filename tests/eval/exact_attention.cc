#include "tests/eval/exact_attention.h"

#include <algorithm>
#include <cmath>

#include "attention/float16.h"
#include "tests/eval/matrix.h"

namespace kvservice::eval {
namespace {

float NormUp(const float* vector, uint32_t head_dim) {
  double squares = 0.0;
  for (uint32_t c = 0; c < head_dim; ++c) squares += double{vector[c]} * vector[c];
  return static_cast<float>(std::sqrt(squares) * (1.0 + 1e-6));
}

// head_dim is a multiple of 16: so many sums run side by side, for the compiler to make vectors of.
float Dot(const float* a, const float* b, uint32_t head_dim) {
  constexpr uint32_t kLanes = 16;
  float sums[kLanes] = {};
  for (uint32_t c = 0; c < head_dim; c += kLanes) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[c + lane] * b[c + lane];
  }
  float total = 0.0F;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

ExactAttention::ExactAttention(const DecoderShape& shape, const SharedPrompt* prompt,
                               size_t contender_count, uint32_t steps_max)
    : shape_(shape),
      prompt_(prompt),
      contender_count_(contender_count),
      steps_max_(steps_max),
      tails_(shape.layer_count),
      key_norms_(size_t{shape.layer_count} * shape.kv_head_count),
      slots_(contender_count, kNotScored) {
  for (uint32_t layer = 0; layer < shape_.layer_count; ++layer) {
    for (uint32_t head = 0; head < shape_.kv_head_count && IsSparse(shape_, layer); ++head) {
      float* largest = &key_norms_[layer * shape_.kv_head_count + head];
      const float* keys = prompt_->keys(layer, head);
      for (size_t token = 0; token < prompt_->length(); ++token) {
        *largest = std::max(*largest, NormUp(keys + token * shape_.head_dim, shape_.head_dim));
      }
    }
  }
}

void ExactAttention::Append(uint32_t layer, const uint16_t* k, const uint16_t* v) {
  LayerTail& tail = tails_[layer];
  tail.keys.resize(TailOffset(contender_count_, 0));
  tail.values.resize(tail.keys.size());
  const size_t at = size_t{tail.count++} * shape_.head_dim;
  length_ = prompt_->length() + tail.count;
  slots_.assign(contender_count_, kNotScored);
  for (size_t contender = 0; contender < contender_count_; ++contender) {
    for (uint32_t head = 0; head < shape_.kv_head_count; ++head) {
      float* keys = &tail.keys[TailOffset(contender, head) + at];
      float* values = &tail.values[TailOffset(contender, head) + at];
      for (uint32_t c = 0; c < shape_.head_dim; ++c) {
        keys[c] = FloatFromBfloat16(*k++);
        values[c] = FloatFromBfloat16(*v++);
      }
      float* largest = &key_norms_[layer * shape_.kv_head_count + head];
      *largest = std::max(*largest, NormUp(keys, shape_.head_dim));
    }
  }
}

// One pass over the shared keys of the prompt for all contenders and query heads of a KV head; then
// each contender's own newest keys, which are few.
void ExactAttention::Score(uint32_t layer, const float* q, absl::Span<const uint32_t> contenders) {
  const uint32_t dim = shape_.head_dim;
  const uint32_t heads = shape_.query_head_count;
  const uint32_t group = heads / shape_.kv_head_count;
  const uint32_t prompt_length = prompt_->length();
  const size_t row_floats = size_t{heads} * dim;
  slots_.assign(contender_count_, kNotScored);
  scaled_.resize(contenders.size() * row_floats);
  logits_.resize(contenders.size() * heads * length_);
  for (uint32_t slot = 0; slot < contenders.size(); ++slot) {
    slots_[contenders[slot]] = slot;
    const float* row = q + contenders[slot] * row_floats;
    for (size_t i = 0; i < row_floats; ++i) scaled_[slot * row_floats + i] = shape_.scale * row[i];
  }
  if (contenders.empty()) return;
  std::vector<const float*> queries;
  std::vector<float*> logits;
  for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
    queries.clear();
    logits.clear();
    for (size_t slot = 0; slot < contenders.size(); ++slot) {
      for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        queries.push_back(&scaled_[slot * row_floats + head * dim]);
        logits.push_back(&logits_[(slot * heads + head) * length_]);
      }
    }
    MultiplyEach(queries, dim, prompt_length, prompt_->keys(layer, kv_head), logits);
    for (size_t row = 0; row < queries.size(); ++row) {
      const Tail own = tail(layer, contenders[row / group], kv_head);
      for (uint32_t token = 0; token < own.count; ++token) {
        logits[row][prompt_length + token] = Dot(queries[row], own.keys + size_t{token} * dim, dim);
      }
    }
  }
}

Tail ExactAttention::tail(uint32_t layer, size_t contender, uint32_t kv_head) const {
  const LayerTail& newest = tails_[layer];
  const size_t at = TailOffset(contender, kv_head);
  return {
      .keys = newest.keys.data() + at, .values = newest.values.data() + at, .count = newest.count};
}

}  // namespace kvservice::eval
