// How errors leave the server: the one place that turns absl::Status into what is sent. Pure;
// any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_STATUS_H_
#define KVSERVICE_KVSERVICE_SERVER_STATUS_H_

#include "absl/status/status.h"

#include "kvservice/v1/error_details.pb.h"

namespace grpc {
class ServerContext;
class Status;
}  // namespace grpc

namespace kvservice {

// Code and message as they are; as details an ErrorInfo always, a BadRequest when a field is to
// blame, a RetryInfo and the trailer `grpc-retry-pushback-ms` (set on `context`, which must not
// have sent its trailers yet) when there is a retry delay. An error without a reason gets its
// code's name.
grpc::Status ToGrpcStatus(const absl::Status& status, grpc::ServerContext* context);

// The other way round, for answers of other servers: code, message and the details above. A status
// without such details has no reason.
absl::Status FromGrpcStatus(const grpc::Status& status);

// The same where gRPC does not carry it. Not for OK.
v1::Status StatusToProto(const absl::Status& status);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_STATUS_H_
