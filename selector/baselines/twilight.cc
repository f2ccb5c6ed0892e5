// Twilight (Lin et al., "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning",
// NeurIPS 2025): weights are estimated from keys of four bits, and the smallest set is kept whose
// estimated mass reaches p. It prunes what a base selector with a generous budget lets through;
// here the base lets everything through, which is the best that any could do. p = 1 - mass_limit
// for every query head; with top_k, the largest estimates.

#include <algorithm>
#include <memory>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/label_scan_index.h"
#include "selector/baselines/label_stores.h"

namespace kvservice::baselines {

std::unique_ptr<const PromptIndex> NewTwilight(const BaselineContext& context) {
  Projection whole_key = {
      .channels = context.prompt->shape.head_dim,
      .apply = [](uint32_t /*head*/, absl::Span<const float> vector, absl::Span<float> label) {
        std::copy(vector.begin(), vector.end(), label.begin());
      }};
  return std::make_unique<LabelScanIndex<FourBitLabels>>(
      LabelIndex<FourBitLabels>(*context.prompt, std::move(whole_key), context.threads));
}

}  // namespace kvservice::baselines
