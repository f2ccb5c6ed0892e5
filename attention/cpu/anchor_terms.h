// What a group tells attention/sharing.h about an anchor that a scan has just made: masses
// from the scan's weights, and exact logits of the few tokens that carry most of what is read.
// Pure; any thread.

#ifndef KVSERVICE_ATTENTION_CPU_ANCHOR_TERMS_H_
#define KVSERVICE_ATTENTION_CPU_ANCHOR_TERMS_H_

#include <cstdint>

#include "absl/types/span.h"
#include "attention/cpu/group_memory.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/device.h"
#include "attention/sharing.h"

namespace kvservice {

// All masks cover the blocks from block_begin on.
struct AnchorTask {
  const LayerShape* shape = nullptr;
  const KvView* view = nullptr;
  const GroupMemory* memory = nullptr;
  uint32_t kv_head = 0;
  const HeadQueries* queries = nullptr;
  // First head of the newest query token, and its queries un-rotated, [group][head_dim].
  uint32_t first_head = 0;
  absl::Span<const float> anchor_queries;
  uint32_t block_begin = 0;
  absl::Span<const uint64_t> always;  // read without a choice
  absl::Span<const uint64_t> open;    // scanned
  absl::Span<const uint64_t> chosen;  // read beside `always`
  const ScanWeights* weights = nullptr;
  absl::Span<const double> always_lse;  // [head_count], exact mass of `always`
};

SharingTerms MakeSharingTerms(const AnchorTask& task);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_ANCHOR_TERMS_H_
