// A reply of Attend with every field, and the request that it answers.

#ifndef KVSERVICE_TESTS_CLIENT_MADE_REPLY_H_
#define KVSERVICE_TESTS_CLIENT_MADE_REPLY_H_

#include <string>

#include "absl/status/statusor.h"
#include "client/attend.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice::testing {

inline constexpr uint32_t kMadeRows = 3;
inline constexpr uint32_t kMadeHeads = 4;
inline constexpr uint32_t kMadeKvHeads = 2;
inline constexpr uint32_t kMadeHeadDim = 2;

// Row 1 has two queries; positions are asked for.
v1::AttendRequest MadeRequest();
// The last row has failed. Tensors are in the message.
v1::AttendResponse MadeResponse();

// All that there is to know about it, to the last bit.
std::string TextOf(const absl::StatusOr<client::AttendResult>& result);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_CLIENT_MADE_REPLY_H_
