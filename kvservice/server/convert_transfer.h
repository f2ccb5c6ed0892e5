// Parts of transfers (kvservice/transfer.h) between the wire and the engine. Pure functions; any
// thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_CONVERT_TRANSFER_H_
#define KVSERVICE_KVSERVICE_SERVER_CONVERT_TRANSFER_H_

#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "kvservice/transfer.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice {

// Takes the bytes out of the message. INVALID_ARGUMENT / TRANSFER_INVALID naming the field for a
// message without a part and for checksums that are none. The engine checks the result further.
absl::StatusOr<TransferPart> PartFromProto(v1::ReceiveRequest* request);
v1::ReceiveRequest PartToProto(TransferPart part);

void ReplyToProto(const ReceiveReply& reply, v1::ReceiveResponse* response);
// INVALID_ARGUMENT / TRANSFER_INVALID for checksums that are none. Without a sequence: its handle
// is all that a message has of it.
absl::StatusOr<ReceiveReply> ReplyFromProto(const v1::ReceiveResponse& response);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CONVERT_TRANSFER_H_
