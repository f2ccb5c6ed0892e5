// Contents of sequences for tests. A token is a number, its *word*; keys, values and queries of a
// word in a layer follow from it, so a sequence is described by its words alone, and attention over
// words can be computed without any cache.

#ifndef KVSERVICE_TESTS_KVSERVICE_WORDS_H_
#define KVSERVICE_TESTS_KVSERVICE_WORDS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/kv_layout.h"

namespace kvservice::testing {

using Words = std::vector<uint32_t>;

// 0, 1, 2, ... from `first`.
Words Counting(uint32_t first, uint32_t count);

enum class Part : uint8_t { kKey, kValue, kQuery };

// [words][heads][head_dim] in `dtype`; heads are KV heads, or query heads for queries.
std::vector<std::byte> PartBytes(const KvLayout& layout, DType dtype, Part part, uint32_t layer,
                                 absl::Span<const uint32_t> words);

// What dense attention of the word at `position` over words [0, position] gives, in double over the
// rounded keys and values and the float32 query.
struct DenseAnswer {
  std::vector<double> out;  // [query_head_count][head_dim]
  std::vector<double> lse;  // [query_head_count]
  // [query_head_count][position + 1]
  std::vector<std::vector<double>> logits;
};
DenseAnswer AttendDensely(const LayerShape& shape, uint32_t layer, absl::Span<const uint32_t> words,
                          uint32_t position);

// Squared error over squared norm.
double NormalizedSquaredError(absl::Span<const float> got, absl::Span<const double> expected);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_KVSERVICE_WORDS_H_
