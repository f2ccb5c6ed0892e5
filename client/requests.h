// Requests as messages. Inside the library only. Pure functions; any thread. What a request says
// about itself is checked here; what only the server knows is left to it.

#ifndef KVSERVICE_CLIENT_REQUESTS_H_
#define KVSERVICE_CLIENT_REQUESTS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "client/attend.h"
#include "client/model.h"
#include "client/policy.h"
#include "client/tensor.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice::client {

v1::SequenceHandle MakeHandle(const std::string& id, uint64_t generation);

v1::Policy PolicyToProto(const Policy& policy);
v1::Model ModelToProto(const ModelDescription& model);

size_t ElementBytes(DType dtype);

// INVALID_ARGUMENT / REQUEST_INVALID unless all extents are at least 1 and multiply to the size.
absl::Status CheckTensor(const TensorView& tensor, const std::string& field);

// Type and shape of tokens of a tensor that has been checked.
void DescribeTensor(const TensorView& tensor, uint32_t count, v1::Tensor* to);

// INVALID_ARGUMENT / REQUEST_INVALID for contradictions: no rows, rows without a sequence, tensors
// whose tokens are not the rows', one of k and v alone. Tensors are described and have no payload
// yet.
absl::Status StepToProto(const AttendStep& step, v1::AttendRequest* request);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_REQUESTS_H_
