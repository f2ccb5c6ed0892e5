// The server's side of one lane (wire/lane_layout.h): takes calls out of its slots, runs them, and
// writes the answers back. Nothing in the memory is believed: numbers are read once, the message
// and its tensors are copied once, and what is checked and used is the copy.
//
// A slot is the lane thread's until it has given the call to the engine; the engine's thread
// writes the answer, gives the slot back, and only then says that the answer is there. A client
// that breaks the rules (a new request before the answer, changes while it waits, an order that is
// none) confuses nobody but itself.

#ifndef KVSERVICE_KVSERVICE_SERVER_LANE_H_
#define KVSERVICE_KVSERVICE_SERVER_LANE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "kvservice/server/service.h"
#include "wire/lane_layout.h"
#include "wire/shared_memory.h"

namespace kvservice {

// What lanes need; borrowed, outlives them and their calls.
struct LaneHost {
  ServiceHost service;
  // Makes the lane thread look at its lanes again; any thread.
  std::function<void()> wake;
};

// Shared by the thread that serves it and by its calls in the engine, so that its memory stays
// mapped until the last of both is gone, whatever becomes of the client.
class Lane final : public std::enable_shared_from_this<Lane> {
 public:
  // `memory` has LaneBytes(shape) bytes.
  Lane(const LaneHost* host, std::string tenant, wire::SharedMemory memory,
       const wire::LaneShape& shape);
  ~Lane();

  // The lane thread alone. Starts the calls that wait; false when there were none.
  bool TakeRequests();
  bool HasRequests() const;
  // Tells the client whether it must wake the thread.
  void SetAsleep(bool asleep) const;

 private:
  struct Slot;
  // A request as it was seen.
  struct Request {
    uint32_t index = 0;
    uint32_t number = 0;
    uint32_t method = 0;
    uint32_t order = 0;
  };

  // The request that waits in a slot, if there is one.
  std::optional<Request> Look(uint32_t index) const;
  // The appends that wait; `last` is the latest of those that were seen.
  void TakeAppends(uint32_t last);
  void Take(const Request& request);
  absl::Status Begin(uint32_t index);
  // Of a slot's call; calls of no method count as Attend.
  const MethodAccess& AccessOfCall(uint32_t index) const;
  absl::Status BeginAttend(uint32_t index);
  void PlaceOutputs(uint32_t index);
  absl::Status BeginAppend(uint32_t index);
  absl::Status CopyMessage(uint32_t index);
  // On the thread that has the slot, once per call.
  void Reply(uint32_t index, const absl::Status& status);
  absl::Status WriteAnswer(uint32_t index);
  absl::Status WriteAppendAnswer(uint32_t index);
  void WriteError(uint32_t index, const absl::Status& status);
  void WriteMessage(uint32_t index, uint32_t code, uint64_t offset, const std::string& message);
  void SetReply(uint32_t index, uint32_t code, uint64_t offset, size_t bytes);

  const LaneHost* const host_;
  const Caller caller_;
  const MethodAccess attend_access_;
  const MethodAccess append_access_;
  const wire::SharedMemory mapping_;
  const wire::LaneMemory memory_;
  std::deque<Slot> slots_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_LANE_H_
