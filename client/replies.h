// Replies, checked against their requests before anything is taken from them: one that does not fit
// is INTERNAL / REPLY_MALFORMED as a whole. Inside the library only. Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_REPLIES_H_
#define KVSERVICE_CLIENT_REPLIES_H_

#include <google/protobuf/arena.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/attend.h"
#include "client/sequence.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/sequence.pb.h"
#include "wire/lane_layout.h"

namespace kvservice::client {

// Memory that a reply's tensors may be ranges of, and where it begins for those.
struct ReplyRegion {
  uint64_t offset = 0;
  absl::Span<const std::byte> bytes = {};
  // Where lse and out must be, for whoever reads them there without the reply; borrowed, nullptr =
  // anywhere.
  const wire::ReplyPlaces* places = nullptr;
};

// Step id, number of rows, sizes of all arrays, sides of all bounds. With `out` the outputs are not
// copied to the rows; it is set to where they lie, in the response or the region.
absl::StatusOr<AttendResult> ResultFromProto(const v1::AttendRequest& request,
                                             const v1::AttendResponse& response,
                                             const ReplyRegion& region = {},
                                             absl::Span<const std::byte>* out = nullptr);

// The memory of a result, which can be had before the reply is there; `with_out` if that has
// outputs in its rows.
AttendResult PrepareResult(const v1::AttendRequest& request, bool with_out);

// As ResultFromProto, of a serialized response, which is quicker: its columns are read where they
// lie. `prepared` is PrepareResult's, or empty. The outputs are in the message, the arena's memory
// or the region.
absl::StatusOr<AttendResult> ResultFromMessage(const v1::AttendRequest& request,
                                               std::string_view message, const ReplyRegion& region,
                                               google::protobuf::Arena* arena,
                                               AttendResult prepared = {},
                                               absl::Span<const std::byte>* out = nullptr);

// A sequence that exists: its id has 16 bytes and, unless `expected_id` is empty, is that one.
absl::Status CheckSequence(const v1::Sequence& sequence, const std::string& expected_id);

SequenceInfo InfoFromProto(const v1::Sequence& sequence);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_REPLIES_H_
