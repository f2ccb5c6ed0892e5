// The bytes of an Attend reply, with the output left where the engine wrote it. Pure; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_
#define KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_

#include <grpcpp/support/byte_buffer.h>

#include "kvservice/server/attend_run.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice {

// Serializes `response`, whose tensors are still empty, with the tensors of `run` as its last
// fields: exactly what protobuf would write, but a float32 output is not copied. Takes the output
// and lse of the call, changes `response`.
grpc::ByteBuffer SerializeAttendReply(v1::AttendResponse* response, AttendRun* run);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_
