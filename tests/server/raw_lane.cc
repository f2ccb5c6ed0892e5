#include "tests/server/raw_lane.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "absl/status/status.h"
#include "tests/server/served_engine.h"
#include "wire/lane_socket.h"

namespace kvservice::testing {
namespace {

constexpr uint64_t kMessageOffset = 48 << 10;

// Of tensors within a request area.
wire::SharedMemory OpenLane(int socket, const wire::LaneShape& shape, uint32_t version) {
  const uint64_t bytes = wire::LaneBytes(shape).value();
  const FileDescriptor file = wire::NewSealedMemory(bytes);
  v1::OpenLaneRequest request = MakeOpen(shape);
  request.set_version(version);
  EXPECT_EQ(OpenAnswer(socket, request.SerializeAsString(), {file.get()}), "OK");
  return wire::SharedMemory::Map(file.get(), bytes);
}

}  // namespace

FileDescriptor ConnectLane(const Endpoint& endpoint) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = endpoint.path + wire::kLaneSuffix;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  FileDescriptor connection(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const auto* const to = reinterpret_cast<const sockaddr*>(&address);
  EXPECT_EQ(connect(connection.get(), to, sizeof(address)), 0);
  // A hang becomes a failure.
  const timeval timeout{.tv_sec = 60, .tv_usec = 0};
  setsockopt(connection.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  return connection;
}

v1::OpenLaneRequest MakeOpen(const wire::LaneShape& shape) {
  v1::OpenLaneRequest request;
  request.set_version(wire::kLaneVersion);
  request.set_slot_count(shape.slot_count);
  request.set_request_bytes(shape.request_bytes);
  request.set_reply_bytes(shape.reply_bytes);
  return request;
}

std::string ErrorText(const v1::Status& error) {
  std::string text = absl::StatusCodeToString(static_cast<absl::StatusCode>(error.code()));
  for (const google::protobuf::Any& detail : error.details()) {
    v1::ErrorInfo info;
    v1::BadRequest bad;
    if (detail.type_url().ends_with(".ErrorInfo") && info.ParseFromString(detail.value())) {
      text += " " + info.reason();
    }
    if (detail.type_url().ends_with(".BadRequest") && bad.ParseFromString(detail.value())) {
      text += " " + bad.field_violations(0).field();
    }
  }
  return text;
}

std::string OpenAnswer(int socket, const std::string& bytes, const std::vector<int>& fds) {
  iovec data{.iov_base = const_cast<char*>(bytes.data()), .iov_len = bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(8 * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* const part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(part), fds.data(), fds.size() * sizeof(int));
  }
  if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) return "CLOSED";
  const wire::Received received = wire::ReceiveMessage(socket);
  if (received.count <= 0) return "CLOSED";
  v1::OpenLaneResponse response;
  EXPECT_TRUE(response.ParseFromString(received.bytes));
  v1::OpenLaneRequest request;
  const bool accepted = request.ParseFromString(bytes) && !response.has_error();
  EXPECT_EQ(response.version(), accepted ? request.version() : wire::kLaneVersion);
  return response.has_error() ? ErrorText(response.error()) : "OK";
}

RawLane::RawLane(const Endpoint& endpoint, const wire::LaneShape& shape, uint32_t version)
    : socket_(ConnectLane(endpoint)),
      mapping_(OpenLane(socket_.get(), shape, version)),
      memory_(mapping_.bytes(), shape) {}

void RawLane::PlaceTensor(uint32_t slot, v1::Tensor* tensor, uint64_t* offset) const {
  const uint64_t bytes = tensor->data().size();
  ASSERT_LE(*offset + bytes, memory_.RequestOffset(slot) + kMessageOffset);
  std::memcpy(memory_.Range(*offset, bytes).data(), tensor->data().data(), bytes);
  tensor->clear_data();
  tensor->mutable_region()->set_offset_bytes(*offset);
  tensor->mutable_region()->set_length_bytes(bytes);
  *offset = wire::AlignUp(*offset + bytes);
}

v1::AttendRequest RawLane::Place(uint32_t slot, v1::AttendRequest request) const {
  uint64_t offset = memory_.RequestOffset(slot);
  PlaceTensor(slot, request.mutable_q(), &offset);
  if (request.has_k()) PlaceTensor(slot, request.mutable_k(), &offset);
  if (request.has_v()) PlaceTensor(slot, request.mutable_v(), &offset);
  return request;
}

v1::AppendRequest RawLane::Place(uint32_t slot, v1::AppendRequest request) const {
  uint64_t offset = memory_.RequestOffset(slot);
  PlaceTensor(slot, request.mutable_k(), &offset);
  PlaceTensor(slot, request.mutable_v(), &offset);
  if (request.has_query_sample()) PlaceTensor(slot, request.mutable_query_sample(), &offset);
  return request;
}

void RawLane::PutMessage(uint32_t slot, const std::string& bytes) const {
  const uint64_t offset = memory_.RequestOffset(slot) + kMessageOffset;
  std::memcpy(memory_.Range(offset, bytes.size()).data(), bytes.data(), bytes.size());
  wire::Store(&head(slot)->request_offset, offset);
  wire::Store(&head(slot)->request_bytes, static_cast<uint32_t>(bytes.size()));
}

void RawLane::Ring() const {
  const char byte = 1;
  send(socket_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void RawLane::Submit(uint32_t slot) const {
  wire::Store(&head(slot)->request_number, wire::Load(head(slot)->request_number) + 1);
  Ring();
}

bool RawLane::Wait(uint32_t slot) const {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (wire::Load(head(slot)->reply_number) != wire::Load(head(slot)->request_number)) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::yield();
  }
  return true;
}

std::string RawLane::Message(uint32_t slot) const {
  const wire::SlotHead& from = *head(slot);
  const auto range = memory_.Range(wire::Load(from.reply_offset), wire::Load(from.reply_bytes));
  return {reinterpret_cast<const char*>(range.data()), range.size()};
}

std::string RawLane::Answer(uint32_t slot) const {
  const uint32_t code = wire::Load(head(slot)->reply_code);
  if (code == 0) return "OK";
  v1::Status error;
  EXPECT_TRUE(error.ParseFromString(Message(slot)));
  EXPECT_EQ(error.code(), static_cast<int>(code));
  return ErrorText(error);
}

v1::AttendResponse RawLane::Response(uint32_t slot) const {
  v1::AttendResponse response;
  EXPECT_TRUE(response.ParseFromString(Message(slot)));
  for (v1::Tensor* tensor : {response.mutable_lse(), response.mutable_out()}) {
    const v1::TensorRegion& region = tensor->region();
    const auto range = memory_.Range(region.offset_bytes(), region.length_bytes());
    tensor->set_data(range.data(), range.size());
    tensor->clear_region();
  }
  return response;
}

v1::AppendResponse RawLane::AppendResponse(uint32_t slot) const {
  v1::AppendResponse response;
  EXPECT_TRUE(response.ParseFromString(Message(slot)));
  return response;
}

std::string RawLane::Append(uint32_t slot, const v1::AppendRequest& placed) const {
  wire::Store(&head(slot)->request_method, wire::kLaneAppend);
  PutMessage(slot, placed.SerializeAsString());
  Submit(slot);
  const std::string answer = Wait(slot) ? Answer(slot) : "no answer";
  wire::Store(&head(slot)->request_method, wire::kLaneAttend);
  return answer;
}

std::string RawLane::Call(uint32_t slot, const v1::AttendRequest& placed) const {
  PutMessage(slot, placed.SerializeAsString());
  Submit(slot);
  return Wait(slot) ? Answer(slot) : "no answer";
}

}  // namespace kvservice::testing
