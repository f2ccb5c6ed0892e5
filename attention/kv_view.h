// What a device may read of one sequence in one layer during one call. Plain borrowed pointers:
// whoever builds a view keeps the blocks pinned and the arrays alive until the device call returns.
// Sealed slices and their sketches are immutable; in the filling slice only tokens below `length`
// may be read.

#ifndef KVSERVICE_ATTENTION_KV_VIEW_H_
#define KVSERVICE_ATTENTION_KV_VIEW_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "attention/kv_layout.h"

namespace kvservice {

struct KvView {
  // [BlockCount(length)] slices in token order, each KvLayout::slice_bytes() long, 64-byte aligned.
  absl::Span<const std::byte* const> slices;
  // [BlockCount(length)] sketch slices (attention/sketch.h), nullptr where the slice is not sealed
  // in this layer. Unsealed slices are always read exactly.
  absl::Span<const std::byte* const> sketches;
  // Tokens that may be read; a row's attended length. May be less than what the slices hold.
  uint32_t length = 0;
  // Names what the arrays hold, unless it is 0: of two views of the same revision, entries of
  // blocks that are full in both are the same.
  uint64_t revision = 0;

  // K of one token, [head_dim] in the cache dtype; V follows at + layout.vector_bytes().
  const std::byte* Row(const KvLayout& layout, uint32_t kv_head, uint32_t token) const {
    return slices[token / kBlockTokens] + layout.RowOffset(kv_head, token % kBlockTokens);
  }
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_KV_VIEW_H_
