// What tighter and looser limits would cost: the certified selector on one query of a sequence,
// once for every limit of a ladder, on the device that serves it. Nothing of the sequence changes,
// and no list is used or made.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_EXPLAIN_H_
#define KVSERVICE_KVSERVICE_EXPLAIN_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/draw_keys.h"
#include "kvservice/engine.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// Fills the ladder in where there is none. INVALID_ARGUMENT / EXPLAIN_INVALID naming
// max_dropped_mass, LAYER_OUT_OF_RANGE, TENSOR_* of q; FAILED_PRECONDITION / QUERY_NOT_KEPT without
// a query.
absl::Status CheckExplain(const SequenceRecord& record, ExplainAsk* ask);

// `ask` was checked. call_number: of no other call.
ExplainReport Explain(const SequenceRecord& record, const ExplainAsk& ask, const DrawKeys& keys,
                      uint64_t call_number, Device* device);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_EXPLAIN_H_
