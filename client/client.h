// Client of KVService. No header of this library mentions gRPC or protobuf.
//
//   auto client = Client::Connect({.endpoint = "unix:/run/kvservice/kvservice.sock"});
//   auto sequence = (*client)->CreateSequence({.model = "llama"});
//   auto row = sequence->Attend({.layer = 0, .position = n, .q = q, .k = k, .v = v});
//
// Members of the plain structs may be left out of such initialisers: all have a value.
//
// Nothing throws; every call has a deadline; errors are taken apart with client/status.h. The
// namespace is nested because a program may also link the service itself.

#ifndef KVSERVICE_CLIENT_CLIENT_H_
#define KVSERVICE_CLIENT_CLIENT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/append_writer.h"
#include "client/attend.h"
#include "client/model.h"
#include "client/options.h"
#include "client/pending_attend.h"
#include "client/policy.h"
#include "client/prepared_attend.h"
#include "client/sequence.h"
#include "client/status.h"
#include "client/step_buffers.h"

namespace kvservice::client {

struct SequenceOptions {
  std::string model = {};
  // The sequence expires when it is not used for so long; 0 = the server's default.
  uint32_t lease_ms = 0;
  // Default: the model's.
  std::optional<Policy> policy = {};
  // Ids of the tokens that will be appended, from the first one on, if they may be matched: the
  // sequence begins with as many of them, in whole blocks, as the tenant has in the cache of the
  // model (Sequence::matched_tokens).
  absl::Span<const uint32_t> token_ids = {};
};

// One connection to one server. Thread-safe; calls but AttendAsync block the calling thread.
class Client {
 public:
  // Waits for the connection. UNAVAILABLE / SERVER_UNREACHABLE when none came about in time,
  // INVALID_ARGUMENT / REQUEST_INVALID for an endpoint that cannot be one. Later breaks of the
  // connection are repaired by themselves.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options);

  // Waits, for at most the data deadline, until sequences left behind are dropped. All sequences
  // and writers must be gone.
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // The way that the next Attend tries first; never kAuto.
  Transport transport() const;

  // Makes a model known and returns its fingerprint; harmless if it is known already.
  // ALREADY_EXISTS when a different one has its name.
  absl::StatusOr<uint64_t> RegisterModel(const ModelDescription& model);

  absl::StatusOr<Sequence> CreateSequence(const SequenceOptions& options);

  // Memory for the tensors of calls of one shape, shared with the server if this client has a lane
  // with a slot to spare that they fit.
  StepBuffers NewStepBuffers(const StepShape& shape);

  // Takes over a sequence that was detached, here or elsewhere.
  Sequence Adopt(std::string id, uint64_t generation);

  // One layer of a batch: appends, chooses, attends, certifies. Safe to repeat. Rows succeed and
  // fail on their own; the call fails only when nothing ran. RESOURCE_EXHAUSTED / OVERLOADED comes
  // with a retry delay and is not repeated by itself.
  absl::StatusOr<AttendResult> Attend(const AttendStep& step);
  // The same without waiting for the answer: at once through shared memory, if this client has a
  // slot to spare that the call fits, else by a thread of its own. The rows, and what they and the
  // tensors point to, are borrowed until the answer has been waited for or given up.
  PendingAttend AttendAsync(const AttendStep& step);
  // Puts the call into shared memory for somebody else to ring. step.buffers have its tensors,
  // whose contents nobody looks at before; INVALID_ARGUMENT as Attend, and for tensors that are not
  // theirs. FAILED_PRECONDITION / LANE_UNAVAILABLE when the buffers are not in the lane that is
  // open now (make new ones), have a call that is not over, or have no room for this one.
  absl::StatusOr<PreparedAttend> PrepareAttend(const AttendStep& step);

 private:
  absl::Status CheckSequences(const AttendStep& step) const;
  explicit Client(std::unique_ptr<Core> core);

  const std::unique_ptr<Core> core_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_CLIENT_H_
