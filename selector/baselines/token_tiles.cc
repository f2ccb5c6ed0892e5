#include "selector/baselines/token_tiles.h"

#include <algorithm>
#include <array>
#include <cassert>

namespace kvservice::baselines {
namespace {

// Query heads that share one pass over a tile.
constexpr uint32_t kHeadsAtOnce = 4;

// Channels that are added at once: sums are then loaded and stored a quarter as often.
constexpr uint32_t kChannelsAtOnce = 4;

using TileRow = std::array<float, kTileTokens>;

template <typename Number>
TileRow Widen(const Number* numbers) {
  TileRow row;
  for (uint32_t t = 0; t < kTileTokens; ++t) row[t] = static_cast<float>(numbers[t]);
  return row;
}

// sums[h] += q[h] . tile for kHeads query heads, the tile's numbers converted once for all.
template <uint32_t kHeads, typename Number>
void AddTile(const Number* tile, uint32_t channels, const float* q, TileRow* sums) {
  uint32_t c = 0;
  for (; c + kChannelsAtOnce <= channels; c += kChannelsAtOnce) {
    const Number* const numbers = tile + size_t{c} * kTileTokens;
    const TileRow row0 = Widen(numbers);
    const TileRow row1 = Widen(numbers + kTileTokens);
    const TileRow row2 = Widen(numbers + 2 * kTileTokens);
    const TileRow row3 = Widen(numbers + 3 * kTileTokens);
    for (uint32_t h = 0; h < kHeads; ++h) {
      const float* const w = q + size_t{h} * channels + c;
      float* const sum = sums[h].data();
      for (uint32_t t = 0; t < kTileTokens; ++t) {
        sum[t] += (w[0] * row0[t] + w[1] * row1[t]) + (w[2] * row2[t] + w[3] * row3[t]);
      }
    }
  }
  for (; c < channels; ++c) {
    const TileRow row = Widen(tile + size_t{c} * kTileTokens);
    for (uint32_t h = 0; h < kHeads; ++h) {
      const float weight = q[size_t{h} * channels + c];
      for (uint32_t t = 0; t < kTileTokens; ++t) sums[h][t] += weight * row[t];
    }
  }
}

template <typename Number>
void AddTile(const Number* tile, uint32_t channels, const float* q, uint32_t heads, TileRow* sums) {
  switch (heads) {
    case 1:
      return AddTile<1>(tile, channels, q, sums);
    case 2:
      return AddTile<2>(tile, channels, q, sums);
    case 3:
      return AddTile<3>(tile, channels, q, sums);
    default:
      return AddTile<kHeadsAtOnce>(tile, channels, q, sums);
  }
}

}  // namespace

template <typename Number>
void TokenTiles<Number>::Reserve(uint32_t tokens) {
  const size_t tiles = (size_t{tokens} + kTileTokens - 1) / kTileTokens;
  tiles_.reserve(tiles * channels_ * kTileTokens);
}

template <typename Number>
void TokenTiles<Number>::Append(absl::Span<const Number> values) {
  if (size_ % kTileTokens == 0) {
    tiles_.resize(tiles_.size() + size_t{channels_} * kTileTokens, Number{0});
  }
  Set(size_++, values);
}

template <typename Number>
void TokenTiles<Number>::Set(uint32_t token, absl::Span<const Number> values) {
  assert(values.size() == channels_);
  const size_t tile = size_t{token / kTileTokens} * channels_ * kTileTokens;
  for (uint32_t c = 0; c < channels_; ++c) {
    tiles_[tile + size_t{c} * kTileTokens + token % kTileTokens] = values[c];
  }
}

template <typename Number>
void TokenTiles<Number>::Dot(absl::Span<const float> q, uint32_t heads, float* dots,
                             size_t stride) const {
  assert(q.size() == size_t{heads} * channels_);
  std::array<TileRow, kHeadsAtOnce> sums;
  for (uint32_t token = 0; token < size_; token += kTileTokens) {
    const uint32_t count = std::min(kTileTokens, size_ - token);
    const Number* const tile = tiles_.data() + size_t{token} * channels_;
    for (uint32_t head = 0; head < heads; head += kHeadsAtOnce) {
      const uint32_t head_count = std::min(kHeadsAtOnce, heads - head);
      for (TileRow& sum : sums) sum.fill(0.0F);
      AddTile(tile, channels_, q.data() + size_t{head} * channels_, head_count, sums.data());
      for (uint32_t h = 0; h < head_count; ++h) {
        std::copy_n(sums[h].begin(), count, dots + (head + h) * stride + token);
      }
    }
  }
}

template class TokenTiles<float>;
template class TokenTiles<uint8_t>;

}  // namespace kvservice::baselines
