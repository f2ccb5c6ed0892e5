// The client's side of a lane, by hand: for what no well-behaved client would do.

#ifndef KVSERVICE_TESTS_SERVER_RAW_LANE_H_
#define KVSERVICE_TESTS_SERVER_RAW_LANE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvservice/server/endpoint.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/error_details.pb.h"
#include "kvservice/v1/lane.pb.h"
#include "kvservice/v1/sequence.pb.h"
#include "wire/file_descriptor.h"
#include "wire/lane_layout.h"
#include "wire/shared_memory.h"

namespace kvservice::testing {

// A connection to the lane socket beside `endpoint`.
FileDescriptor ConnectLane(const Endpoint& endpoint);

v1::OpenLaneRequest MakeOpen(const wire::LaneShape& shape);

// Sends bytes with descriptors and returns what came back: "OK", or "CODE REASON field", or
// "CLOSED" when the server hung up without a word.
std::string OpenAnswer(int socket, const std::string& bytes, const std::vector<int>& fds);

// "CODE REASON field" of an error in a reply or in OpenLaneResponse.
std::string ErrorText(const v1::Status& error);

// An open lane. Everything about it may be changed at any time.
class RawLane {
 public:
  static constexpr wire::LaneShape kShape = {
      .slot_count = 2, .request_bytes = 65536, .reply_bytes = 65536};

  explicit RawLane(const Endpoint& endpoint, const wire::LaneShape& shape = kShape,
                   uint32_t version = wire::kLaneVersion);

  const wire::LaneMemory& memory() const { return memory_; }
  wire::SlotHead* head(uint32_t slot) const { return memory_.slot(slot); }
  int socket() const { return socket_.get(); }
  void Hang() { socket_ = FileDescriptor(); }

  // Moves the tensors of `request` from its data to the slot's request area.
  v1::AttendRequest Place(uint32_t slot, v1::AttendRequest request) const;
  v1::AppendRequest Place(uint32_t slot, v1::AppendRequest request) const;
  // Puts the bytes behind the tensors and names them in the slot's head.
  void PutMessage(uint32_t slot, const std::string& bytes) const;
  // Makes it a request, and wakes the server.
  void Submit(uint32_t slot) const;
  void Ring() const;
  // Waits until the answer of the latest Submit is there; false after half a minute.
  bool Wait(uint32_t slot) const;

  // After Wait: "OK" or the error.
  std::string Answer(uint32_t slot) const;
  // The message, with the tensors' payloads in it.
  v1::AttendResponse Response(uint32_t slot) const;
  v1::AppendResponse AppendResponse(uint32_t slot) const;
  // All of it.
  std::string Append(uint32_t slot, const v1::AppendRequest& placed) const;
  std::string Call(uint32_t slot, const v1::AttendRequest& placed) const;

 private:
  // Takes the next place in the slot's request area.
  void PlaceTensor(uint32_t slot, v1::Tensor* tensor, uint64_t* offset) const;
  std::string Message(uint32_t slot) const;

  FileDescriptor socket_;
  wire::SharedMemory mapping_;
  wire::LaneMemory memory_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_RAW_LANE_H_
