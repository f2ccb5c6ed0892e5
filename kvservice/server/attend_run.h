// An Attend between its request and its reply, the same for every way in: what the engine works on,
// and how requests and replies are made of messages. One call; one thread at a time.

#ifndef KVSERVICE_KVSERVICE_SERVER_ATTEND_RUN_H_
#define KVSERVICE_KVSERVICE_SERVER_ATTEND_RUN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kvservice/engine.h"
#include "kvservice/server/call.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/policy_registry.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice {

// Stays where it is: `call` points into it.
struct AttendRun {
  AttendPolicies policies;
  DType output_dtype = DType::kFloat32;
  AttendCall call;
  // The bytes of the results, [rows], each made where its row was answered: in one thread they
  // would be a large part of a call.
  std::vector<std::string> row_bytes;
  uint64_t arrived_ns = 0;
};

// Fills everything but `call.done` and `arrived_ns`. `call` borrows from `request` and from
// `region`, which is nullptr for calls whose tensors are in the message. Errors as AttendFromProto
// and OutputDTypeFromProto.
absl::Status PrepareAttend(const v1::AttendRequest& request, const PolicyRegistry& registry,
                           const std::string& tenant, RegionCopy* region, AttendRun* run);

// Everything of the reply but the rows' results and the two tensors. Tells the gate the times.
void DescribeAttend(const v1::AttendRequest& request, const AttendRun& run, const CallHost& host,
                    v1::AttendResponse* response);

// Type and shape of the two tensors.
void DescribeOutputs(const AttendRun& run, v1::Tensor* lse, v1::Tensor* out);

// The output as the caller wants it: [T][query_head_count][head_dim] elements of `dtype`.
void StoreOutput(DType dtype, absl::Span<const float> out, std::byte* to);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ATTEND_RUN_H_
