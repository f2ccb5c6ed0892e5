// Vectors of tokens laid out so that a dot product with all of them is a loop over tokens: tiles of
// 64 tokens, each [channels][64]. Grows at the end. One writer, then any number of readers.

#ifndef KVSERVICE_SELECTOR_BASELINES_TOKEN_TILES_H_
#define KVSERVICE_SELECTOR_BASELINES_TOKEN_TILES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace kvservice::baselines {

inline constexpr uint32_t kTileTokens = 64;

// Number: float, or uint8_t for codes that stand for themselves.
template <typename Number>
class TokenTiles {
 public:
  explicit TokenTiles(uint32_t channels) : channels_(channels) {}

  uint32_t channels() const { return channels_; }
  uint32_t size() const { return size_; }

  void Reserve(uint32_t tokens);
  // values: [channels].
  void Append(absl::Span<const Number> values);
  // Token `token`'s channels again, for those that change while their page fills.
  void Set(uint32_t token, absl::Span<const Number> values);

  // dots[h * stride + t] = sum over c of q[h][c] * (channel c of token t), t < size(). q: [heads]
  // [channels].
  void Dot(absl::Span<const float> q, uint32_t heads, float* dots, size_t stride) const;

 private:
  uint32_t channels_;
  uint32_t size_ = 0;
  std::vector<Number> tiles_;  // [tile][channels][kTileTokens]
};

extern template class TokenTiles<float>;
extern template class TokenTiles<uint8_t>;

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_TOKEN_TILES_H_
