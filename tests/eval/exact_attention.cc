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

}  // namespace

ExactAttention::ExactAttention(const DecoderShape& shape, const SharedPrompt* prompt,
                               size_t contender_count, uint32_t steps_max)
    : shape_(shape),
      prompt_(prompt),
      contender_count_(contender_count),
      steps_max_(steps_max),
      tail_counts_(shape.layer_count),
      tail_keys_(TailOffset(shape.layer_count, 0, 0)),
      tail_values_(tail_keys_.size()),
      scaled_(contender_count * shape.query_head_count * shape.head_dim) {
  for (uint32_t layer = 0; layer < shape_.layer_count; ++layer) {
    for (uint32_t head = 0; head < shape_.kv_head_count; ++head) {
      float largest = 0.0F;
      const float* keys = prompt_->keys(layer, head);
      for (size_t token = 0; token < prompt_->length(); ++token) {
        largest = std::max(largest, NormUp(keys + token * shape_.head_dim, shape_.head_dim));
      }
      key_norms_.push_back(largest);
    }
  }
}

void ExactAttention::Append(uint32_t layer, const uint16_t* k, const uint16_t* v) {
  const size_t at = size_t{tail_counts_[layer]++} * shape_.head_dim;
  for (size_t contender = 0; contender < contender_count_; ++contender) {
    for (uint32_t head = 0; head < shape_.kv_head_count; ++head) {
      float* keys = &tail_keys_[TailOffset(layer, contender, head) + at];
      float* values = &tail_values_[TailOffset(layer, contender, head) + at];
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
// the shared keys of the prompt; then each contender's own newest keys.
void ExactAttention::Score(uint32_t layer, const float* q) {
  const uint32_t dim = shape_.head_dim;
  const uint32_t heads = shape_.query_head_count;
  const uint32_t group = heads / shape_.kv_head_count;
  const uint32_t prompt_length = prompt_->length();
  const uint32_t tail_count = tail_counts_[layer];
  length_ = prompt_length + tail_count;
  logits_.resize(contender_count_ * heads * length_);
  for (size_t i = 0; i < scaled_.size(); ++i) scaled_[i] = shape_.scale * q[i];
  for (uint32_t head = 0; head < heads; ++head) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(contender_count_),
                static_cast<int>(prompt_length), static_cast<int>(dim), 1.0F, &scaled_[head * dim],
                static_cast<int>(heads * dim), prompt_->keys(layer, head / group),
                static_cast<int>(dim), 0.0F, &logits_[size_t{head} * length_],
                static_cast<int>(heads * length_));
    for (size_t contender = 0; contender < contender_count_; ++contender) {
      const size_t row = contender * heads + head;
      cblas_sgemv(CblasRowMajor, CblasNoTrans, static_cast<int>(tail_count), static_cast<int>(dim),
                  1.0F, &tail_keys_[TailOffset(layer, contender, head / group)],
                  static_cast<int>(dim), &scaled_[row * dim], 1, 0.0F,
                  &logits_[row * length_ + prompt_length], 1);
    }
  }
}

Tail ExactAttention::tail(uint32_t layer, size_t contender, uint32_t kv_head) const {
  const size_t at = TailOffset(layer, contender, kv_head);
  return {.keys = &tail_keys_[at], .values = &tail_values_[at], .count = tail_counts_[layer]};
}

}  // namespace kvservice::eval
