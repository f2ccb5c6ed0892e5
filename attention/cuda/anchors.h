// What an anchor of verified sharing is made of on the device, as kernels.h: plain structs of
// device pointers and a launcher that enqueues.

#ifndef KVSERVICE_ATTENTION_CUDA_ANCHORS_H_
#define KVSERVICE_ATTENTION_CUDA_ANCHORS_H_

#include <cstddef>
#include <cstdint>

#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

// One KV head of one row whose list was chosen, after FindThresholds and SelectTokens; scanned
// without bounds. Words are [block_count], positions count from word 0.
struct AnchorSet {
  const std::byte* const* slices = nullptr;
  const std::byte* const* sketches = nullptr;
  const uint64_t* first = nullptr;    // read without a choice
  const uint64_t* to_scan = nullptr;  // scanned
  const uint64_t* chosen = nullptr;
  const float* weights = nullptr;  // as ScanSet, like the next two
  const int32_t* reference = nullptr;
  const float* page_sum = nullptr;
  const HeadSums* first_sums = nullptr;  // [head_count], of `first`
  const float* qs = nullptr;             // [head_count][head_dim], scaled
  const uint32_t* visible = nullptr;     // [head_count][2]
  uint32_t kv_head = 0;
  uint32_t block_count = 0;
  uint32_t first_head = 0;  // of the newest query token
  // Of the newest query token's heads: estimates of what the chosen tokens come to, [group];
  // SharingTerms::shift and variance, or null: not wanted.
  HeadSums* chosen_sums = nullptr;
  float* shift = nullptr;
  float* variance = nullptr;
};
struct AnchorCall {
  CacheShape shape;
  float softcap = 0.0F;
  const AnchorSet* sets = nullptr;
  uint32_t set_count = 0;
  uint32_t group_size = 1;
};
cudaError_t DescribeAnchors(const AnchorCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ANCHORS_H_
