// One connection's worth of a transfer: from the first part to the last, or to where it breaks.

#ifndef KVSERVICE_KVSERVICE_SERVER_TRANSFER_ATTEMPT_H_
#define KVSERVICE_KVSERVICE_SERVER_TRANSFER_ATTEMPT_H_

#include <string>

#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "kvservice/server/transfers.h"
#include "kvservice/v1/sequence.grpc.pb.h"

namespace grpc {
class ClientContext;
}  // namespace grpc

namespace kvservice {

struct TransferSent {
  // The head that was sent: what the sequence was when the transfer began.
  std::string head;
  // On the target.
  SequenceId id;
  uint64_t generation = 0;
};

// Blocks until the target has the sequence or it has failed; cancelling the context ends it.
// `sent_bytes` grows by the rows that were sent, whatever comes of it. UNAVAILABLE /
// TRANSFER_TARGET_UNREACHABLE if the connection broke: the next attempt goes on from there.
absl::StatusOr<TransferSent> RunTransferAttempt(const TransferAsk& ask, Engine* engine,
                                                v1::SequenceService::StubInterface* target,
                                                grpc::ClientContext* context, uint64_t* sent_bytes);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TRANSFER_ATTEMPT_H_
