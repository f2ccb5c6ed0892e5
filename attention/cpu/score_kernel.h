// Exact logits of single tokens for one head, and the norms of values: what a proof reads beside
// the attention itself.

#ifndef KVSERVICE_ATTENTION_CPU_SCORE_KERNEL_H_
#define KVSERVICE_ATTENTION_CPU_SCORE_KERNEL_H_

#include <cstdint>

#include "absl/types/span.h"
#include "attention/cpu/head_queries.h"
#include "attention/device.h"

namespace kvservice {

// A logit after soft-cap; the exact one is within `error`.
struct Score {
  double logit = 0.0;
  double error = 0.0;
};

struct ScoreTask {
  const LayerShape* shape = nullptr;
  const KvView* view = nullptr;
  uint32_t kv_head = 0;
  const HeadQueries* queries = nullptr;
  uint32_t head = 0;
  // Any order, repetitions allowed.
  absl::Span<const uint32_t> positions;
};

// scores: [positions]. A key for which nothing can be said gets an infinite or NaN error.
void ScoreTokens(const ScoreTask& task, Score* scores);

// Bounds of the largest value norm of a set of tokens: bit t of word b stands for position
// (block_begin + b) * 64 + t. Zero for an empty set; not finite values make `upper` infinite.
struct ValueNorms {
  double lower = 0.0;
  double upper = 0.0;
};
// From the largest squared norm, added up in fp32 in any order; one that is not finite counts as
// largest.
ValueNorms ValueNormsOf(double largest_squares);
// With what sketches say of the others: the largest norm of a sealed block (SketchPage::vmax), and
// of one that the row sees as a whole; of others it may be that of a token outside the window.
ValueNorms JoinValueNorms(ValueNorms unsketched, double sealed_max, double whole_max);
// How far an output may be from the exact one, that of a kernel in units of the largest norm given:
// the kernel's own error, and the rounding of the output to float.
inline double OutputArithmeticError(const ValueNorms& norms, double arithmetic) {
  return norms.upper * (arithmetic + 0x1p-23) + 0x1p-119;
}
ValueNorms BoundValueNorms(const LayerShape& shape, const KvView& view, uint32_t kv_head,
                           absl::Span<const uint64_t> tokens, uint32_t block_begin);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_SCORE_KERNEL_H_
