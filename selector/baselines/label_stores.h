// Labels: what methods that scan keep of a key instead of its channels. Both stores have the same
// form, so that LabelIndex works with either. One writer, then any number of readers.

#ifndef KVSERVICE_SELECTOR_BASELINES_LABEL_STORES_H_
#define KVSERVICE_SELECTOR_BASELINES_LABEL_STORES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/token_tiles.h"

namespace kvservice::baselines {

// Four bits per channel between the token's smallest and largest one: asymmetric, per token, as
// the codes of Double Sparsity and Twilight do. (Double Sparsity's evaluation code rounds queries
// alike; here they stay exact, which is favourable to it.)
class FourBitLabels {
 public:
  explicit FourBitLabels(uint32_t channels) : codes_(channels) {}
  // Codes, and smallest value and step in 16 bits each.
  static double BytesPerToken(uint32_t channels) { return channels / 2.0 + 4.0; }

  uint32_t size() const { return codes_.size(); }
  void Reserve(uint32_t tokens);
  // label: [channels].
  void Append(absl::Span<const float> label);
  // dots[h * stride + t] = q[h] . (label of token t), t < size(). q: [heads][channels].
  void Dot(absl::Span<const float> q, uint32_t heads, float* dots, size_t stride) const;

 private:
  TokenTiles<uint8_t> codes_;
  std::vector<float> low_;   // [size]
  std::vector<float> step_;  // [size]
};

// Sixteen bits per channel (rounded to float16, held widened).
class HalfLabels {
 public:
  explicit HalfLabels(uint32_t channels) : values_(channels) {}
  static double BytesPerToken(uint32_t channels) { return channels * 2.0; }

  uint32_t size() const { return values_.size(); }
  void Reserve(uint32_t tokens) { values_.Reserve(tokens); }
  void Append(absl::Span<const float> label);
  void Dot(absl::Span<const float> q, uint32_t heads, float* dots, size_t stride) const {
    values_.Dot(q, heads, dots, stride);
  }

 private:
  TokenTiles<float> values_;
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_LABEL_STORES_H_
