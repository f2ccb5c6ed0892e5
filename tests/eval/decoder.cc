#include "tests/eval/decoder.h"

#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "attention/float16.h"
#include "tests/eval/exp.h"
#include "tests/eval/matrix.h"
#include "tests/eval/model_file.h"

namespace kvservice::eval {
namespace {

// x / rms(x) * weight over `width` numbers; out may be x.
void Norm(const float* x, const std::vector<float>& weight, float epsilon, float* out) {
  const size_t width = weight.size();
  double squares = 0;
  for (size_t i = 0; i < width; ++i) squares += double{x[i]} * double{x[i]};
  const double mean = squares / static_cast<double>(width);
  const auto factor = static_cast<float>(1.0 / std::sqrt(mean + double{epsilon}));
  for (size_t i = 0; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

std::vector<float> NormRows(size_t rows, const float* hidden, const std::vector<float>& weight,
                            float epsilon) {
  std::vector<float> normed(rows * weight.size());
  for (size_t row = 0; row < rows; ++row) {
    Norm(hidden + row * weight.size(), weight, epsilon, &normed[row * weight.size()]);
  }
  return normed;
}

// Adds `part` to `hidden`, normalised first if there is a weight for it.
void AddRows(size_t rows, size_t width, std::vector<float>* part, const std::vector<float>& weight,
             float epsilon, float* hidden) {
  for (size_t row = 0; row < rows && !weight.empty(); ++row) {
    float* values = &(*part)[row * width];
    Norm(values, weight, epsilon, values);
  }
  for (size_t i = 0; i < rows * width; ++i) hidden[i] += (*part)[i];
}

// gate * sigmoid(gate) * up: SwiGLU. gate and up: [width]; gate receives the result.
void SwiGlu(size_t width, const float* up, float* gate) {
  for (size_t i = 0; i < width; ++i) gate[i] = gate[i] / (1.0F + Exp(-gate[i])) * up[i];
}

// The tanh form of GELU, gated: gate (1 + tanh(u)) / 2 = gate * sigmoid(2u),
// u = sqrt(2 / pi) (gate + 0.044715 gate^3).
void GeGlu(size_t width, const float* up, float* gate) {
  constexpr float kTwiceRoot = 1.59576912F, kCubic = 0.044715F;
  for (size_t i = 0; i < width; ++i) {
    const float x = gate[i];
    const float twice_u = kTwiceRoot * (x + kCubic * x * x * x);
    gate[i] = x / (1.0F + Exp(-twice_u)) * up[i];
  }
}

struct Angles {
  std::vector<float> cos, sin;  // [head_dim / 2]
};

void SetAngles(const std::vector<float>& inverse_frequencies, uint32_t position, Angles* angles) {
  for (size_t i = 0; i < inverse_frequencies.size(); ++i) {
    const double angle = double{inverse_frequencies[i]} * position;
    angles->cos[i] = static_cast<float>(std::cos(angle));
    angles->sin[i] = static_cast<float>(std::sin(angle));
  }
}

// head: [head_dim], in place.
void Rotate(const Angles& angles, float* head) {
  const size_t half = angles.cos.size();
  for (size_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * angles.cos[i] - second * angles.sin[i];
    head[i + half] = second * angles.cos[i] + first * angles.sin[i];
  }
}

void Round(const float* values, size_t count, uint16_t* bits) {
  for (size_t i = 0; i < count; ++i) bits[i] = Bfloat16FromFloat(values[i]);
}

}  // namespace

Decoder::Decoder(std::unique_ptr<const ModelWeights> weights) : weights_(std::move(weights)) {}
Decoder::~Decoder() = default;

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Load(const std::string& path) {
  UseOneThread();
  auto weights = ReadModelFile(path);
  if (!weights.ok()) return weights.status();
  return std::unique_ptr<Decoder>(new Decoder(std::move(*weights)));
}

const DecoderShape& Decoder::shape() const { return weights_->shape; }
uint64_t Decoder::fingerprint() const { return weights_->fingerprint; }

void Decoder::Embed(absl::Span<const uint32_t> tokens, float* hidden) const {
  const size_t width = shape().hidden;
  const bool is_gemma = shape().family == Family::kGemma3;
  const float factor = is_gemma ? std::sqrt(static_cast<float>(width)) : 1.0F;
  for (size_t row = 0; row < tokens.size(); ++row) {
    assert(tokens[row] < shape().vocabulary);
    const float* from = &weights_->embedding[tokens[row] * width];
    for (size_t i = 0; i < width; ++i) hidden[row * width + i] = from[i] * factor;
  }
}

void Decoder::Project(uint32_t layer, absl::Span<const uint32_t> positions, const float* hidden,
                      float* q, uint16_t* k, uint16_t* v) const {
  const DecoderShape& shape = weights_->shape;
  const LayerWeights& weights = weights_->layers[layer];
  const size_t rows = positions.size();
  const size_t query_channels = size_t{shape.query_head_count} * shape.head_dim;
  const size_t kv_channels = size_t{shape.kv_head_count} * shape.head_dim;
  const size_t width = query_channels + 2 * kv_channels;
  const std::vector<float> normed =
      NormRows(rows, hidden, weights.attention_norm, shape.norm_epsilon);
  std::vector<float> qkv(rows * width);
  MultiplyRows(rows, shape.hidden, width, normed.data(), weights.qkv.data(), qkv.data());
  Angles angles = {.cos = std::vector<float>(shape.head_dim / 2),
                   .sin = std::vector<float>(shape.head_dim / 2)};
  for (size_t row = 0; row < rows; ++row) {
    SetAngles(shape.inverse_frequencies[layer], positions[row], &angles);
    float* heads = &qkv[row * width];
    for (uint32_t i = 0; i < shape.query_head_count + shape.kv_head_count; ++i) {
      float* head = heads + size_t{i} * shape.head_dim;
      const std::vector<float>& norm = i < shape.query_head_count ? weights.q_norm : weights.k_norm;
      if (!norm.empty()) Norm(head, norm, shape.norm_epsilon, head);
      Rotate(angles, head);
    }
    std::memcpy(q + row * query_channels, heads, query_channels * sizeof(float));
    Round(heads + query_channels, kv_channels, k + row * kv_channels);
    Round(heads + query_channels + kv_channels, kv_channels, v + row * kv_channels);
  }
}

void Decoder::Finish(uint32_t layer, size_t rows, const float* attention, float* hidden) const {
  const DecoderShape& shape = weights_->shape;
  const LayerWeights& weights = weights_->layers[layer];
  const size_t query_channels = size_t{shape.query_head_count} * shape.head_dim;
  const size_t inner = shape.feed_forward;
  std::vector<float> part(rows * shape.hidden);
  MultiplyRows(rows, query_channels, shape.hidden, attention, weights.output.data(), part.data());
  AddRows(rows, shape.hidden, &part, weights.post_attention, shape.norm_epsilon, hidden);
  const std::vector<float> normed =
      NormRows(rows, hidden, weights.feed_forward_norm, shape.norm_epsilon);
  std::vector<float> gate(rows * inner), up(rows * inner);
  MultiplyRows(rows, shape.hidden, inner, normed.data(), weights.gate_up.data(), gate.data());
  MultiplyRows(rows, shape.hidden, inner, normed.data(), &weights.gate_up[inner * shape.hidden],
               up.data());
  const auto activate = shape.family == Family::kLlama ? SwiGlu : GeGlu;
  activate(rows * inner, up.data(), gate.data());
  MultiplyRows(rows, inner, shape.hidden, gate.data(), weights.down.data(), part.data());
  AddRows(rows, shape.hidden, &part, weights.post_feed_forward, shape.norm_epsilon, hidden);
}

void Decoder::Logits(size_t rows, const float* hidden, float* logits) const {
  const DecoderShape& shape = weights_->shape;
  const std::vector<float> normed =
      NormRows(rows, hidden, weights_->output_norm, shape.norm_epsilon);
  MultiplyRows(rows, shape.hidden, shape.vocabulary, normed.data(), weights_->embedding.data(),
               logits);
}

}  // namespace kvservice::eval
