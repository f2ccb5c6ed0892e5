#include "tests/eval/exact_attention.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

#include "attention/float16.h"

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

// One product per query head: the rows of all contenders, which lie a constant stride apart, times
// the shared keys of the prompt; then each contender's own newest keys, which are few.
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
  for (uint32_t head = 0; head < heads; ++head) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(contenders.size()),
                static_cast<int>(prompt_length), static_cast<int>(dim), 1.0F, &scaled_[head * dim],
                static_cast<int>(row_floats), prompt_->keys(layer, head / group),
                static_cast<int>(dim), 0.0F, &logits_[size_t{head} * length_],
                static_cast<int>(heads * length_));
    for (size_t slot = 0; slot < contenders.size(); ++slot) {
      const Tail own = tail(layer, contenders[slot], head / group);
      const float* query = &scaled_[slot * row_floats + head * dim];
      float* logits = &logits_[(slot * heads + head) * length_ + prompt_length];
      for (uint32_t token = 0; token < own.count; ++token) {
        logits[token] = Dot(query, own.keys + size_t{token} * dim, dim);
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
