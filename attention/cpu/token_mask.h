// Sets of tokens of one row as bits: word b stands for block block_begin + b, bit t of it for the
// block's token t. What a plan reads, hides, scans and drops are all such sets, so that set algebra
// is a line and a slice is taken or skipped whole.

#ifndef KVSERVICE_ATTENTION_CPU_TOKEN_MASK_H_
#define KVSERVICE_ATTENTION_CPU_TOKEN_MASK_H_

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/kv_layout.h"

namespace kvservice {

static_assert(kBlockTokens == 64, "a block is one word");

using TokenMask = std::vector<uint64_t>;

// The tokens of `block` that lie in [begin, end).
inline uint64_t RangeWord(uint32_t block, uint64_t begin, uint64_t end) {
  const uint64_t first = uint64_t{block} * kBlockTokens;
  const uint64_t low = std::max(begin, first);
  const uint64_t high = std::min(end, first + kBlockTokens);
  if (low >= high) return 0;
  const uint64_t up_to_high = ~uint64_t{0} >> (kBlockTokens - (high - first));
  return up_to_high & (~uint64_t{0} << (low - first));
}

inline uint32_t CountTokens(absl::Span<const uint64_t> mask) {
  uint32_t count = 0;
  for (const uint64_t word : mask) count += static_cast<uint32_t>(std::popcount(word));
  return count;
}

// True if every token of `a` is in `b`; both cover the same blocks.
inline bool IsSubset(absl::Span<const uint64_t> a, absl::Span<const uint64_t> b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if ((a[i] & ~b[i]) != 0) return false;
  }
  return true;
}

// Adds those of the positions that the mask's blocks hold.
inline void AddPositions(absl::Span<const uint32_t> positions, uint32_t block_begin,
                         TokenMask* mask) {
  for (const uint32_t position : positions) {
    const uint32_t block = position / kBlockTokens;
    if (block < block_begin || block - block_begin >= mask->size()) continue;
    (*mask)[block - block_begin] |= uint64_t{1} << (position % kBlockTokens);
  }
}

// Ascending positions of a set.
inline std::vector<uint32_t> PositionsOf(absl::Span<const uint64_t> mask, uint32_t block_begin) {
  std::vector<uint32_t> positions;
  positions.reserve(CountTokens(mask));
  for (size_t i = 0; i < mask.size(); ++i) {
    const auto first = (block_begin + static_cast<uint32_t>(i)) * kBlockTokens;
    for (uint64_t word = mask[i]; word != 0; word &= word - 1) {
      positions.push_back(first + static_cast<uint32_t>(std::countr_zero(word)));
    }
  }
  return positions;
}

// Adds to every token its neighbours within +-radius; bits that leave the mask's blocks are lost.
inline void Dilate(uint32_t radius, TokenMask* mask) {
  const TokenMask source = *mask;
  const size_t size = source.size();
  for (uint32_t distance = 1; distance <= radius; ++distance) {
    const size_t blocks = distance / kBlockTokens;
    const uint32_t bits = distance % kBlockTokens;
    for (size_t i = 0; i + blocks < size; ++i) {
      (*mask)[i + blocks] |= source[i] << bits;
      (*mask)[i] |= source[i + blocks] >> bits;
      if (bits == 0 || i + blocks + 1 >= size) continue;
      (*mask)[i + blocks + 1] |= source[i] >> (kBlockTokens - bits);
      (*mask)[i] |= source[i + blocks + 1] << (kBlockTokens - bits);
    }
  }
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_TOKEN_MASK_H_
