// Executes the choosing part of a plan for one KV head: which tokens of the middle are read, and
// what the lists remember. One thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_CHOOSE_H_
#define KVSERVICE_ATTENTION_REFERENCE_CHOOSE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/reference/head_row.h"

namespace kvservice::reference {

struct Choice {
  // Chosen tokens of the middle, ascending. With `everything` all of it.
  std::vector<uint32_t> middle;
  // Nothing was chosen: the plan says so, or its set is larger than dense_share.
  bool everything = false;
  // A full scan was made to choose.
  bool scanned = false;
  bool reused = false;
  // Cosine of the most similar anchor, -2 when not looked for.
  float similarity = -2.0F;
  // See GroupReport.
  float sharing_estimate = -1.0F;
  // See GroupReport.
  float key_norm_max = -1.0F;
  float query_distance = -1.0F;
};

// queries: the last query token's queries of this KV head, un-rotated, [group][head_dim]; read only
// by kReuse. Reads and changes plan.lists.
Choice Choose(const Plan& plan, absl::Span<const float> queries, HeadRow* row);

// The KV head had to be answered densely after all.
void RememberDense(const Plan& plan, const HeadRow& row);

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_CHOOSE_H_
