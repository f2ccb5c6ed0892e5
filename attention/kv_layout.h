// Geometry of the KV cache: how keys and values of one layer lie in memory.
//
// A *block* is kBlockTokens consecutive tokens of all layers; a *slice* is one layer of a block and
// is contiguous:
//
//     slice = [kv_head][token in block][K | V][head_dim]      in the cache dtype, little endian
//
// One *row* (one token, one KV head, K then V side by side) is one gather of row_bytes().
// Everything here is plain data and inline arithmetic, shared by hosts and devices; any thread may
// use it.

#ifndef KVSERVICE_ATTENTION_KV_LAYOUT_H_
#define KVSERVICE_ATTENTION_KV_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"

namespace kvservice {

// Tokens of a block: the unit of allocation, sharing, eviction and sealing.
inline constexpr uint32_t kBlockTokens = 64;
// Query tokens of one row of a call (speculative decoding); they are causal among themselves.
inline constexpr uint32_t kQueryTokensMax = 8;
// Query heads that may share one KV head.
inline constexpr uint32_t kGroupMax = 16;
inline constexpr uint32_t kHeadDimMax = 256;
// Positions at the start of a sequence that are always read exactly and never sketched into min/max
// (attention sinks).
inline constexpr uint32_t kSketchSinks = 8;

// Element type of cached keys and values.
enum class DType : uint8_t { kFloat32, kFloat16, kBfloat16 };

constexpr uint32_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Shape of one layer's cache; equal in all layers of a model.
struct KvLayout {
  uint32_t query_head_count = 0;
  uint32_t kv_head_count = 0;
  uint32_t head_dim = 0;
  DType dtype = DType::kBfloat16;

  // Query heads per KV head (GQA); query head h reads KV head h / group_size().
  constexpr uint32_t group_size() const { return query_head_count / kv_head_count; }
  constexpr uint32_t vector_bytes() const { return head_dim * ElementBytes(dtype); }
  constexpr uint32_t row_bytes() const { return 2 * vector_bytes(); }
  constexpr size_t slice_bytes() const {
    return static_cast<size_t>(kv_head_count) * kBlockTokens * row_bytes();
  }
  // Offset of a token's K within its slice; its V follows at + vector_bytes().
  constexpr size_t RowOffset(uint32_t kv_head, uint32_t token_in_block) const {
    return (static_cast<size_t>(kv_head) * kBlockTokens + token_in_block) * row_bytes();
  }
  friend bool operator==(const KvLayout&, const KvLayout&) = default;
};

constexpr uint32_t BlockCount(uint32_t token_count) {
  return (token_count + kBlockTokens - 1) / kBlockTokens;
}

// INVALID_ARGUMENT naming the field unless the layout is one that every device serves: head_dim 64,
// 80, 96, 128 or 256, a whole number of query heads per KV head, at most kGroupMax of them.
absl::Status ValidateLayout(const KvLayout& layout);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_KV_LAYOUT_H_
