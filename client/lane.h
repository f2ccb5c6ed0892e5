// Attend and Append calls through memory shared with a server on the same host
// (wire/lane_layout.h). Inside the library only.

#ifndef KVSERVICE_CLIENT_LANE_H_
#define KVSERVICE_CLIENT_LANE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/append_part.h"
#include "client/attend.h"
#include "client/options.h"
#include "client/prepared_attend.h"
#include "client/step_buffers.h"
#include "kvservice/v1/attention.pb.h"
#include "wire/file_descriptor.h"
#include "wire/lane_layout.h"
#include "wire/shared_memory.h"

namespace kvservice::client {

// An Attend that lies ready in a slot for somebody else to ring.
struct PreparedSlot {
  uint32_t index = 0;
  Doorbell doorbell;
  // Where the answer will have them: [T][query_head_count] and [T][query_head_count][head_dim].
  absl::Span<const float> lse;
  absl::Span<const float> out;
};

// One open lane. Any thread; each call has a slot of its own, and the calling thread waits.
class Lane {
 public:
  // FAILED_PRECONDITION / LANE_UNAVAILABLE when nobody offers one, else what the server says.
  static absl::StatusOr<std::shared_ptr<Lane>> Open(const ClientOptions& options);

  // Sends `request`, whose tensors are described but have no payload yet: they are ranges of the
  // lane afterwards. The slot that it has; nothing if it must take another way: all slots are busy,
  // it is too large for one, the server is gone. Each is ended or abandoned once.
  std::optional<uint32_t> BeginAttend(const AttendStep& step, v1::AttendRequest* request);
  // The answer; nothing if the call must take another way, where repeating it is safe: the server
  // is going down or gone, or the answer is too large.
  std::optional<absl::StatusOr<AttendResult>> EndAttend(
      uint32_t index, const v1::AttendRequest& request, StepBuffers* buffers,
      std::chrono::steady_clock::time_point deadline);
  // Nobody waits for the answer any more, which may still come.
  void AbandonAttend(uint32_t index) { LeaveSlot(index, true); }

  // As BeginAttend in the slot of the step's buffers, which the tensors are in already, but nothing
  // tells the server: FAILED_PRECONDITION / LANE_UNAVAILABLE if they have no slot here, or one with
  // a call, or the call is too large for it. Each is ended or dropped once.
  absl::StatusOr<PreparedSlot> PrepareAttend(const AttendStep& step, v1::AttendRequest* request);
  // Instead of somebody else.
  void RingPrepared(uint32_t index);
  // Waits for whoever rings and then for the answer. UNAVAILABLE or DEADLINE_EXCEEDED, both
  // LANE_BROKEN, when there is none: then the lane is broken.
  absl::StatusOr<AttendResult> EndPrepared(uint32_t index, const v1::AttendRequest& request,
                                           StepBuffers* buffers,
                                           std::chrono::steady_clock::time_point deadline);
  // Nobody wants the answer: the call is taken back if it has not been rung.
  void DropPrepared(uint32_t index);

  // One append's message through a slot that was reserved, after the answer to the one before: puts
  // it there and tells the server. Messages are taken in the order of these calls. False when the
  // server is gone.
  bool BeginAppend(uint32_t index, const AppendPart& part);
  // Waits for the answer. UNAVAILABLE when the server is gone before.
  absl::StatusOr<v1::AppendResponse> EndAppend(uint32_t index,
                                               std::chrono::steady_clock::time_point deadline);
  // Nobody waits for the answer any more, which may still come.
  void AbandonAppend(uint32_t index) { LeaveSlot(index, true); }
  // Up to `count` slots for appends, which have at most half of all; none when there are none to
  // spare. Each is given back once.
  std::vector<uint32_t> ReserveAppendSlots(uint32_t count);
  void ReturnAppendSlot(uint32_t index);

  // A slot for one caller's calls, whose request area has room for `tensor_bytes` and a message;
  // nothing when none is to spare. Given back once.
  std::optional<uint32_t> ReserveSlot(size_t tensor_bytes);
  void ReturnSlot(uint32_t index);
  absl::Span<std::byte> memory() const { return mapping_.bytes(); }
  uint64_t request_bytes() const { return memory_.shape().request_bytes; }
  absl::Span<std::byte> RequestMemory(uint32_t index) const {
    return memory_.Range(memory_.RequestOffset(index), memory_.shape().request_bytes);
  }

  // Asks the system; one call.
  bool IsConnected() const;
  // The server is gone, or answers what is none.
  bool is_broken() const { return is_broken_; }

 private:
  struct Slot {
    uint32_t number = 0;
    // A private copy of the last answer's message: kept, for its memory.
    std::string message;
    bool is_taken = false;
    // For StepBuffers, between their calls too.
    bool is_reserved = false;
    // Its caller's time was over: free once the answer is there.
    bool is_abandoned = false;
    // Somebody outside may wait for the answer, until it is there.
    bool is_prepared = false;
    // The lane broke before that: what says that the answer is there is this client's.
    bool is_released = false;
  };
  enum class Outcome : uint8_t { kAnswered, kTimeOver, kBroken };

  Lane(FileDescriptor socket, wire::SharedMemory memory, const wire::LaneShape& shape,
       std::chrono::microseconds spin)
      : socket_(std::move(socket)),
        mapping_(std::move(memory)),
        memory_(mapping_.bytes(), shape),
        spin_(spin),
        slots_(shape.slot_count) {}

  // Of buffers that have one here, theirs.
  std::optional<uint32_t> TakeSlot(const StepBuffers* buffers);
  // Needs mutex_ held: the caller who gave up no longer matters once the answer is there.
  void Reclaim(uint32_t index);
  void LeaveSlot(uint32_t index, bool abandon);
  bool PutRequest(uint32_t index, const AttendStep& step, v1::AttendRequest* request);
  // Names the message at `offset` of the memory, of which the server does not know yet, and takes
  // the slot's next number for it.
  void PutHead(uint32_t index, uint32_t method, uint64_t offset, uint64_t bytes);
  // Makes it a request. False when the server is gone.
  bool Ring(uint32_t index);
  // If it sleeps. False when it is gone.
  bool WakeServer() const;
  // No more calls go through the lane, and prepared ones that have no answer get one from here: no
  // stream waits for ever, and none rings with a message that the server takes. Without mutex_.
  void Break();
  bool IsReleased(uint32_t index);
  wire::ReplyPlaces PlacesOf(uint32_t index, const v1::AttendRequest& request) const;
  // Until a prepared call was rung and a server that sleeps has been woken: kAnswered, which is as
  // much as there can be. Looks now and then, as whoever rings wakes nobody.
  Outcome WaitForRing(uint32_t index, std::chrono::steady_clock::time_point deadline) const;
  Outcome Wait(uint32_t index, std::chrono::steady_clock::time_point deadline);
  bool SpinForReply(uint32_t index) const;
  bool IsAnswered(uint32_t index) const;
  // The answer's message, or the error.
  absl::Status TakeMessage(uint32_t index, std::string* message);
  // `places`: where the outputs must be, nullptr = anywhere.
  absl::StatusOr<AttendResult> TakeReply(uint32_t index, const v1::AttendRequest& request,
                                         AttendResult prepared, StepBuffers* buffers,
                                         const wire::ReplyPlaces* places);

  const FileDescriptor socket_;
  const wire::SharedMemory mapping_;
  const wire::LaneMemory memory_;
  const std::chrono::microseconds spin_;
  std::atomic<bool> is_broken_{false};

  std::mutex mutex_;
  // Guarded by mutex_, but for number and message, which are the taker's; a prepared call's number
  // stays what it is.
  std::vector<Slot> slots_;
  uint32_t append_slots_ = 0;
  uint32_t append_order_ = 0;
};

// The lane of a client, opened again some time after it broke. Any thread.
class LanePath {
 public:
  // `options` is borrowed.
  explicit LanePath(const ClientOptions* options) : options_(options) {}

  // Opens the lane; once, before anything else. Without it there never is one.
  absl::Status Open();
  // Shared with calls under way when the lane breaks; nullptr when there is none at present.
  std::shared_ptr<Lane> Get();

 private:
  const ClientOptions* const options_;

  std::mutex mutex_;
  // Guarded by mutex_.
  std::shared_ptr<Lane> lane_;
  bool was_open_ = false;
  bool is_opening_ = false;
  std::chrono::steady_clock::time_point retry_at_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_LANE_H_
