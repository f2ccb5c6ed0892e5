// An Attend call on its way, so that one thread has several: while the server works on half of a
// batch, the model works on the other.
//
//   auto first = client->AttendAsync(half);
//   auto second = client->AttendAsync(other_half);
//   auto result = first.Wait();

#ifndef KVSERVICE_CLIENT_PENDING_ATTEND_H_
#define KVSERVICE_CLIENT_PENDING_ATTEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "client/attend.h"

namespace kvservice::client {

// Made by Client::AttendAsync, which outlives it. Move-only, one thread at a time.
class PendingAttend {
 public:
  // Of a call that nobody has waited for: its answer is lost, what it stored stays. StepBuffers
  // have to take another way than shared memory until it has come; a call that a thread makes is
  // waited for.
  ~PendingAttend();
  PendingAttend(PendingAttend&& other) noexcept;
  PendingAttend& operator=(PendingAttend&&) = delete;

  // The answer, as Client::Attend gives it. Once.
  absl::StatusOr<AttendResult> Wait();

 private:
  friend class Client;
  struct State;
  // `status`: whether it may be sent at all.
  PendingAttend(Core* core, const AttendStep& step, absl::Status status);

  std::unique_ptr<State> state_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_PENDING_ATTEND_H_
