// The bytes of an Attend reply, with the output left where the engine wrote it. Pure; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_
#define KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_

#include <grpcpp/support/byte_buffer.h>

#include "kvservice/server/attend_run.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice {

// The results of the run's rows as fields of an AttendResponse: how many bytes they are, and those
// bytes, written to where there is room for them; returns their end.
size_t RowFieldsBytes(const AttendRun& run);
uint8_t* WriteRowFields(const AttendRun& run, uint8_t* to);

// Serializes `response`, whose results and tensors are still empty, with the results of `run` as
// its first fields and its tensors as the last; a float32 output is not copied. Takes the output
// and lse of the call, changes `response`.
grpc::ByteBuffer SerializeAttendReply(v1::AttendResponse* response, AttendRun* run);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ATTEND_REPLY_H_
