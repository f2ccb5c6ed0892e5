// Deferred exact masses: the query tokens of the last steps of a sequence and layer wait with what
// they kept, and when there are enough of them all keys are scored for all of them in one pass.
// The mass that a step dropped follows from the total: 1 - kept / total, with both sides of each.
// Neighbours then share a pass of up to kQueryTokensMax tokens. A call that asked for no proof has
// no bounds of what it kept: such a step waits with what it attended and has a pass of its own.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_DEFERRED_EXACT_H_
#define KVSERVICE_KVSERVICE_DEFERRED_EXACT_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/plan.h"
#include "kvservice/deferred_report.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// Adds a row that was answered in the enforced mode to what waits in its layer. Returns the masses
// of all steps that waited, oldest first, once they have `step_tokens` query tokens, this row's
// included; else nothing. row.selected is needed if NeedsSelection.
std::vector<DeferredMasses> DeferExact(const AttendRow& row, uint32_t layer, uint32_t step_tokens,
                                       SequenceRecord* record, Device* device);

inline bool NeedsSelection(const Plan& plan) { return plan.prove == Guarantee::kNone; }

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DEFERRED_EXACT_H_
