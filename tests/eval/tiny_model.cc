#include "tests/eval/tiny_model.h"

#include <cmath>
#include <fstream>

#include "attention/float16.h"

namespace kvservice::eval {

TinyModel::TinyModel(const DecoderShape& shape) : shape_(shape), bytes_("KVMODEL1") {
  for (const uint32_t count :
       {static_cast<uint32_t>(shape.family), shape.layer_count, shape.query_head_count,
        shape.kv_head_count, shape.head_dim, shape.hidden, shape.feed_forward, shape.vocabulary}) {
    Put(count);
  }
  Put(shape.scale);
  Put(shape.norm_epsilon);
  for (const uint32_t window : shape.windows) Put(window);
  for (const std::vector<float>& of_layer : shape.inverse_frequencies) {
    for (const float frequency : of_layer) Put(frequency);
  }
  Matrix("embedding", shape.vocabulary, shape.hidden, 1.0);
  Norm("output_norm", shape.hidden);
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) AddLayer(std::to_string(layer));
}

std::string TinyModel::Write(const std::string& folder, const std::string& name) const {
  const std::string path = folder + name + ".kvmodel";
  std::ofstream(path, std::ios::binary) << bytes_;
  return path;
}

void TinyModel::AddLayer(const std::string& layer) {
  const bool is_gemma = family() == Family::kGemma3;
  const size_t query_width = size_t{shape_.query_head_count} * shape_.head_dim;
  const size_t kv_width = size_t{shape_.kv_head_count} * shape_.head_dim;
  Norm("attention_norm" + layer, shape_.hidden);
  Matrix("qkv" + layer, query_width + 2 * kv_width, shape_.hidden, 2.0);
  if (is_gemma) Norm("q_norm" + layer, shape_.head_dim);
  if (is_gemma) Norm("k_norm" + layer, shape_.head_dim);
  Matrix("output" + layer, shape_.hidden, query_width, 1.0);
  if (is_gemma) Norm("post_attention" + layer, shape_.hidden);
  Norm("feed_forward_norm" + layer, shape_.hidden);
  Matrix("gate_up" + layer, 2 * size_t{shape_.feed_forward}, shape_.hidden, 1.0);
  Matrix("down" + layer, shape_.hidden, shape_.feed_forward, 1.0);
  if (is_gemma) Norm("post_feed_forward" + layer, shape_.hidden);
}

void TinyModel::Norm(const std::string& name, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(1.0 + normal_(random_) / 4);
    Put(value);
    tensors_[name].push_back(value);
  }
}

void TinyModel::Matrix(const std::string& name, size_t rows, size_t columns, double size) {
  for (size_t i = 0; i < rows * columns; ++i) {
    const double value = size * normal_(random_) / std::sqrt(static_cast<double>(columns));
    const uint16_t bits = Float16FromFloat(static_cast<float>(value));
    Put(bits);
    tensors_[name].push_back(FloatFromFloat16(bits));
  }
}

}  // namespace kvservice::eval
