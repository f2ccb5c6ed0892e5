// Attention over a subset of the tokens: a normalised output and the natural log of its softmax
// denominator. Partials of disjoint subsets merge exactly, in any order; this file is the one home
// of that formula. Pure functions; any thread.

#ifndef KVSERVICE_ATTENTION_PARTIAL_H_
#define KVSERVICE_ATTENTION_PARTIAL_H_

#include <cmath>
#include <cstdint>

namespace kvservice {

// Merges partial b into partial a, in place: out_a, out_b are [head_dim]; lse_* are ln sum
// exp(logit). An empty partial has lse = -inf and its output is ignored (it may be NaN: 0 * NaN
// must not leak, which is why both weights are tested).
template <typename Real>
void MergePartial(Real* out_a, Real* lse_a, const Real* out_b, Real lse_b, uint32_t head_dim) {
  if (std::isinf(lse_b) && lse_b < 0) return;
  if (std::isinf(*lse_a) && *lse_a < 0) {
    for (uint32_t c = 0; c < head_dim; ++c) out_a[c] = out_b[c];
    *lse_a = lse_b;
    return;
  }
  const Real top = *lse_a > lse_b ? *lse_a : lse_b;
  const Real weight_a = std::exp(*lse_a - top);
  const Real weight_b = std::exp(lse_b - top);
  const Real total = weight_a + weight_b;
  for (uint32_t c = 0; c < head_dim; ++c) {
    out_a[c] = (weight_a * out_a[c] + weight_b * out_b[c]) / total;
  }
  *lse_a = top + std::log(total);
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_PARTIAL_H_
