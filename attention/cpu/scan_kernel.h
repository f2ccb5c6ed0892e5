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
#include "attention/device.h"

namespace kvservice {

// What a scan needs of the queries of one KV head of one row, beyond what attention does, for all
// pages.
struct ScanQueries {
  struct Head {
    // Projections of qs on the sketch directions; zero without any.
    float qw[4] = {};
    float x_norm = 0.0F;  // ||x||
    // ||qs|| + sum_j |qw_j| ||W_j||, rounded up.
    double weight = 0.0;
  };
  std::vector<Head> heads;  // [head_count]
  // [head_count][head_dim], |p_c| / M_c rounded up. Filled for bounded scans only.
  std::vector<float> x;
};

// `q`: the heads' queries as received, [head_count] pointers to [head_dim].
void PrepareScan(const LayerShape& shape, absl::Span<const float* const> q,
                 const SketchTable& table, bool bounded, ScanQueries* queries);

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

  uint32_t head_count = 0;
  uint32_t block_begin = 0;
  uint32_t block_count = 0;
  bool bounded = false;
  std::vector<int32_t> reference;  // [head_count][block_count]
  std::vector<float> estimate;     // [head_count][block_count][64]: e^s^
  // [head_count][block_count]: the sum of a page's estimates, tokens that a head does not see left
  // out. Choosing needs it for whole pages, and here it costs nothing.
  std::vector<float> estimate_sum;
  // With bounds: lower <= e^s <= upper for the true logit s, device rounding included. An upper
  // weight of infinity or NaN says that nothing is known.
  std::vector<float> upper, lower;
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
