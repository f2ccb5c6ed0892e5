// What the reference device tells attention/sharing.h: exact logits of what was read, estimated
// ones of what was left. One thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_SHARING_H_
#define KVSERVICE_ATTENTION_REFERENCE_SHARING_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/reference/head_row.h"
#include "attention/sharing.h"

namespace kvservice::reference {

// For an anchor of the newest query token. queries: un-rotated, [group][head_dim]; `open` was
// scanned, `read` (ascending) was read: of the open tokens, those that are in it.
SharingTerms TermsOfAnchor(absl::Span<const float> queries, const std::vector<uint32_t>& open,
                           const std::vector<uint32_t>& read, HeadRow* row);

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_SHARING_H_
