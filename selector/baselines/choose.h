// From weights to positions: the part that is the same for every method. Pure functions; any
// thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_CHOOSE_H_
#define KVSERVICE_SELECTOR_BASELINES_CHOOSE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baseline.h"

namespace kvservice::baselines {

// The tokens between sinks and local window, [begin, end).
struct Middle {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t count() const { return end - begin; }
};
Middle MiddleOf(const TokenBudget& budget, uint32_t length);

// Prompt::layers, spelt out.
std::vector<uint32_t> ChoosingLayers(const Prompt& prompt);
// Indices into Prompt::heads of those layers, ascending: what an index has to be made for.
std::vector<uint32_t> ChoosingHeads(const Prompt& prompt);

// Weights of some tokens for several query heads: row h is data[h * stride ...], `count` finite
// numbers >= 0 that start at the first of those tokens.
struct WeightRows {
  const float* data = nullptr;
  size_t stride = 0;
  uint32_t heads = 0;
  uint32_t count = 0;
  const float* row(uint32_t head) const { return data + head * stride; }
};

// Appends first + i for the top_k largest weights[i] (finite, >= 0), ascending; among equals the
// earlier. O(count), no sorting.
void KeepLargest(absl::Span<const float> weights, uint32_t top_k, uint32_t first,
                 std::vector<uint32_t>* positions);

// Appends, ascending, the fewest with which every head drops at most `limit`, when tokens are kept
// in the order of their largest weight over the heads (equals: the earlier first). A head's dropped
// mass is dropped_before[h] (empty = 0) plus its weights of the tokens that are not kept.
void KeepByMass(const WeightRows& rows, double limit, absl::Span<const double> dropped_before,
                uint32_t first, std::vector<uint32_t>* positions);

// The rule of all methods that estimate probabilities. probabilities: [heads][length]; keeps of the
// middle by mass where there is a mass_limit, else the top_k by the sum over the heads.
void KeepForGroup(absl::Span<const float> probabilities, uint32_t heads, uint32_t length,
                  const TokenBudget& budget, std::vector<uint32_t>* positions);

// Sum of the rows, [count].
std::vector<float> SumOverHeads(const WeightRows& rows);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_CHOOSE_H_
