#include "tests/bench/layer_data.h"

#include <algorithm>
#include <cmath>

#include "attention/float16.h"
#include "attention/sketch.h"

namespace kvservice::bench {
namespace {

// Where one KV head's queries look: a direction that its hot tokens share.
std::vector<float> UnitVector(uint32_t head_dim, std::mt19937_64* random) {
  std::normal_distribution<float> normal;
  std::vector<float> unit(head_dim);
  float squares = 0.0F;
  for (float& x : unit) {
    x = normal(*random);
    squares += x * x;
  }
  for (float& x : unit) x /= std::sqrt(squares);
  return unit;
}

}  // namespace

// Keys of unit deviation per channel. Queries of norm 1 / scale give them logits of deviation 1;
// hot keys lie hot_nats further along their head's direction.
LayerSource::LayerSource(const LayerOptions& options, float scale)
    : options_(options), query_norm_(1.0F / scale), random_(options.seed) {
  for (uint32_t head = 0; head < options.layout.kv_head_count; ++head) {
    directions_.push_back(UnitVector(options.layout.head_dim, &random_));
    hot_.emplace_back(options.length, false);
    for (uint32_t i = 0; i < options.hot_tokens; ++i) {
      hot_[head][random_() % options.length] = true;
    }
  }
}

void LayerSource::Token(uint32_t token, std::byte* k, std::byte* v) {
  const KvLayout& layout = options_.layout;
  for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      const size_t index = static_cast<size_t>(head) * layout.head_dim + c;
      const float along = hot_[head][token] ? options_.hot_nats * directions_[head][c] : 0.0F;
      StoreElement(layout.dtype, normal_(random_) + along, k, index);
      StoreElement(layout.dtype, normal_(random_), v, index);
    }
  }
}

std::vector<float> LayerSource::Queries() {
  const KvLayout& layout = options_.layout;
  std::vector<float> queries;
  for (uint32_t head = 0; head < layout.query_head_count; ++head) {
    const std::vector<float>& direction = directions_[head / layout.group_size()];
    const std::vector<float> own = UnitVector(layout.head_dim, &random_);
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      queries.push_back(query_norm_ * (direction[c] + 0.2F * own[c]));
    }
  }
  return queries;
}

absl::Status LayerData::Make(const LayerOptions& options, Device* device, LayerData* data) {
  const KvLayout& layout = options.layout;
  const SketchLayout sketch(layout.head_dim);
  const uint32_t block_count = BlockCount(options.length);
  data->length_ = options.length;
  data->shape_.layout = layout;
  data->shape_.scale = 1.0F / std::sqrt(static_cast<float>(layout.head_dim));
  data->tables_.assign(layout.kv_head_count, IdentitySketchTable(layout.head_dim));
  auto slices = device->Allocate(block_count * layout.slice_bytes());
  if (!slices.ok()) return slices.status();
  data->slice_memory_ = std::move(*slices);
  auto sketches = device->Allocate(block_count * sketch.slice_bytes(layout.kv_head_count));
  if (!sketches.ok()) return sketches.status();
  data->sketch_memory_ = std::move(*sketches);

  LayerSource source(options, data->shape_.scale);
  const size_t token_bytes = static_cast<size_t>(layout.kv_head_count) * layout.vector_bytes();
  std::vector<std::byte> k(kBlockTokens * token_bytes);
  std::vector<std::byte> v(k.size());
  for (uint32_t block = 0; block < block_count; ++block) {
    const uint32_t count = std::min(kBlockTokens, options.length - block * kBlockTokens);
    for (uint32_t t = 0; t < count; ++t) {
      source.Token(block * kBlockTokens + t, &k[t * token_bytes], &v[t * token_bytes]);
    }
    std::byte* slice = data->slice_memory_.data() + block * layout.slice_bytes();
    const AppendSlice append{.slice = slice, .token_count = count, .k = k.data(), .v = v.data()};
    device->Append(layout, {&append, 1});
    data->slices_.push_back(slice);
    data->sketches_.push_back(nullptr);
    if (count < kBlockTokens) continue;
    std::byte* bytes =
        data->sketch_memory_.data() + block * sketch.slice_bytes(layout.kv_head_count);
    data->sketches_.back() = bytes;
    data->seal_calls_.push_back(
        {.slice = slice, .sketch = bytes, .block_index = block, .tables = data->tables_});
  }
  device->Seal(layout, data->seal_calls_);
  data->queries_ = source.Queries();
  return absl::OkStatus();
}

}  // namespace kvservice::bench
