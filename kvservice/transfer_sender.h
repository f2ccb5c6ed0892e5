// The source's side of a transfer (kvservice/transfer.h): parts of a sequence in memory, one by
// one. Nothing is remembered between two of them and nothing is changed, so a transfer that is
// broken off leaves nothing behind here. Executor thread.

#ifndef KVSERVICE_KVSERVICE_TRANSFER_SENDER_H_
#define KVSERVICE_KVSERVICE_TRANSFER_SENDER_H_

#include "absl/status/statusor.h"
#include "kvservice/sequence_table.h"
#include "kvservice/transfer.h"

namespace kvservice {

// What was asked for. INVALID_ARGUMENT / LAYER_OUT_OF_RANGE, OUT_OF_RANGE / LENGTH_OUT_OF_RANGE for
// blocks that the sequence does not have.
absl::StatusOr<TransferPart> ReadTransferPart(const SequenceRecord& record, const SendAsk& ask);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TRANSFER_SENDER_H_
