// An Attend call that lies ready in shared memory until somebody rings: a GPU's stream that writes
// q, k and v there, so that no thread waits for the stream before every layer.
//
//   // Once: cuMemHostRegister of buffers.shared_memory() with CU_MEMHOSTREGISTER_DEVICEMAP; the
//   // stream gets its addresses by cuMemHostGetDevicePointer.
//   step.SetBuffers(&buffers, /*store=*/true);
//   auto call = client->PrepareAttend(step);
//   ... launch what writes buffers.q(), k() and v() ...
//   cuStreamWriteValue32(stream, request, value, CU_STREAM_WRITE_VALUE_DEFAULT);  // of doorbell()
//   cuStreamWaitValue32(stream, reply, value, CU_STREAM_WAIT_VALUE_GEQ);
//   ... launch what reads call->out() ...
//   auto result = call->Finish();  // later: certificates, and whether it went well
//
// The stream does not see errors. When Finish has one, or one of a row, the stream has gone on with
// whatever was in out(), and what it has stored through later calls is made of that: truncate the
// sequences to the step's position and repeat the step. Calls that were not rung yet when the lane
// broke store nothing.

#ifndef KVSERVICE_CLIENT_PREPARED_ATTEND_H_
#define KVSERVICE_CLIENT_PREPARED_ATTEND_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/attend.h"

namespace kvservice::client {

// Two words of shared memory, each in a cache line of its own.
struct Doorbell {
  // Rings when `value` is stored here, once, after q, k and v: a release in the system's scope,
  // which cuStreamWriteValue32 is by default.
  uint32_t* request = nullptr;
  uint32_t value = 0;
  // The answer is there once this has reached `value`, as int32_t(*reply - value) >= 0, and no
  // sooner: an acquire in the system's scope. It may be further by the time that a stream looks: a
  // lane that breaks counts on for the next call in the slot.
  const uint32_t* reply = nullptr;
};

// Made by Client::PrepareAttend, which outlives it, as do the step's buffers; the other parts of
// the step are needed no longer. Move-only, one thread at a time, but for the words and the
// tensors.
class PreparedAttend {
 public:
  // Without Finish. A call that was not rung is taken back; to ring it later is a mistake that the
  // server may answer with whatever the slot has by then. One that was rung is abandoned: what it
  // stores stays, and its buffers can be used again once the answer has come.
  ~PreparedAttend();
  PreparedAttend(PreparedAttend&& other) noexcept;
  PreparedAttend& operator=(PreparedAttend&&) = delete;

  const Doorbell& doorbell() const;
  // Where the answer's outputs will be, known before it: [token_count][query_head_count] and
  // [token_count][query_head_count][head_dim]. Until the next call with these buffers begins.
  absl::Span<const float> lse() const;
  absl::Span<const float> out() const;

  // Rings from this thread, which has written the tensors.
  void Ring();

  // The answer, as Client::Attend gives it, within the data deadline from now on. Once. Waits for
  // the ring as well, and wakes a server that sleeps then, which nobody else does: calls are
  // finished in the order in which they are rung, or a call may wait for one before it that nobody
  // has seen. UNAVAILABLE / LANE_BROKEN when the server is gone, DEADLINE_EXCEEDED / LANE_BROKEN
  // when there was no answer in time: then the lane is broken, no stream waits any longer in any
  // prepared call, and new buffers are needed; the old ones keep the lane's memory, and its place
  // in the server, until they are gone. Errors of the server are as of Attend, but no other way is
  // tried: UNAVAILABLE / DRAINING, RESOURCE_EXHAUSTED / REPLY_TOO_LARGE.
  absl::StatusOr<AttendResult> Finish();

 private:
  friend class Client;
  struct State;
  static absl::StatusOr<PreparedAttend> Prepare(Core* core, const AttendStep& step);
  explicit PreparedAttend(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_PREPARED_ATTEND_H_
