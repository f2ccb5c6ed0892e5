// Scans sketches: from the 4-bit codes of a sealed slice to the softmax weight of each of its
// tokens, per query head, as an estimate or as an interval that holds the true weight. The formula
// and why it holds are in attention/scan_terms.h; this kernel evaluates it with integer dot
// products, whose only error is that of rounding the factors a_c to integers, and that is added up
// and joins the bound.
//
// Weights of a page carry a power of two of their own (certificate section 2), so that one pass
// suffices: the weight of a token is stored * 2^reference of its page and head.

#ifndef KVSERVICE_ATTENTION_CPU_SCAN_KERNEL_H_
#define KVSERVICE_ATTENTION_CPU_SCAN_KERNEL_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/scan_queries.h"
#include "attention/device.h"

namespace kvservice {

// Weights of the sealed tokens in a range of blocks, for all heads; zero for a token that a head
// does not see. Only pages that were scanned are written; the others hold nothing.
struct ScanWeights {
  void Resize(uint32_t heads, uint32_t first_block, uint32_t blocks, bool with_bounds);

  size_t PageIndex(uint32_t head, uint32_t block) const {
    return size_t{head} * block_count + (block - block_begin);
  }
  float* Page(std::vector<float>& weights, uint32_t head, uint32_t block) const {
    return &weights[PageIndex(head, block) * kBlockTokens];
  }
  const float* Page(const std::vector<float>& weights, uint32_t head, uint32_t block) const {
    return &weights[PageIndex(head, block) * kBlockTokens];
  }
  // The weights that were computed.
  const std::vector<float>& numbers() const { return bounded ? upper : estimate; }

  uint32_t head_count = 0;
  uint32_t block_begin = 0;
  uint32_t block_count = 0;
  bool bounded = false;
  // [head_count][block_count], the power of two next to the page's largest weight: no weight is
  // above 1.5, unknown ones aside, of which a page consists if it has one (least reference).
  std::vector<int32_t> reference;
  // [head_count][block_count]: the sum of a page's weights, which costs nothing here: seven
  // additions in fp32.
  std::vector<float> page_sum;
  // Without bounds: e^s^, [head_count][block_count][64].
  std::vector<float> estimate;
  // With bounds: at least e^s for the true logit s, device rounding included; infinity or NaN say
  // that nothing is known. [head_count][block_count][64].
  std::vector<float> upper;
  // With bounds, [head_count][block_count]: how the weights of a page relate to their upper ends.
  // upper * lower_share - 2^-126 <= e^s for each of its tokens; upper * estimate_share is about
  // e^s^, for planning. Both zero where nothing is known.
  std::vector<float> lower_share, estimate_share;
};

struct ScanTask {
  const LayerShape* shape = nullptr;
  const KvView* view = nullptr;
  uint32_t kv_head = 0;
  const HeadQueries* queries = nullptr;
  const ScanQueries* scan_queries = nullptr;
  const SketchTable* table = nullptr;
  // Pages to scan are those of blocks [block_begin, block_begin + tokens.size()) with a bit set.
  // They must be sealed.
  absl::Span<const uint64_t> tokens;
  uint32_t block_begin = 0;
};

// Runs on the best instruction set of the machine. Tasks of disjoint blocks may share `weights`.
void ScanPages(const ScanTask& task, ScanWeights* weights);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_SCAN_KERNEL_H_
