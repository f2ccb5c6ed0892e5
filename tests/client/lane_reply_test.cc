// Answers in a lane that no server of ours gives.

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "client/lane.h"
#include "client/step_buffers.h"
#include "kvservice/v1/lane.pb.h"
#include "tests/client/made_reply.h"
#include "tests/server/served_engine.h"
#include "wire/lane_socket.h"

namespace kvservice::testing {
namespace {

// Takes one lane and answers one call in its first slot with the same bytes, whatever it asks.
class OneAnswer {
 public:
  OneAnswer(const std::string& path, const v1::AttendResponse& response)
      : listener_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    EXPECT_LT(path.size(), sizeof(address.sun_path));
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    const auto* const to = reinterpret_cast<const sockaddr*>(&address);
    EXPECT_EQ(bind(listener_.get(), to, sizeof(address)), 0);
    EXPECT_EQ(listen(listener_.get(), 1), 0);
    thread_ = std::thread([this, response] { Serve(response); });
  }
  ~OneAnswer() { thread_.join(); }
  OneAnswer(const OneAnswer&) = delete;
  OneAnswer& operator=(const OneAnswer&) = delete;

 private:
  void Serve(v1::AttendResponse response) const {
    const FileDescriptor connection(accept(listener_.get(), nullptr, nullptr));
    const wire::Received received = wire::ReceiveMessage(connection.get());
    v1::OpenLaneRequest open;
    ASSERT_TRUE(open.ParseFromString(received.bytes));
    const wire::LaneShape shape = {.slot_count = open.slot_count(),
                                   .request_bytes = open.request_bytes(),
                                   .reply_bytes = open.reply_bytes()};
    const wire::SharedMemory mapping =
        wire::SharedMemory::Map(received.fd.get(), *wire::LaneBytes(shape));
    const wire::LaneMemory memory(mapping.bytes(), shape);
    v1::OpenLaneResponse opened;
    opened.set_version(wire::kLaneVersion);
    ASSERT_TRUE(wire::SendMessage(connection.get(), opened.SerializeAsString(), -1));

    wire::SlotHead* const head = memory.slot(0);
    while (wire::Load(head->request_number) == 0) std::this_thread::yield();
    const uint64_t begin = memory.ReplyOffset(0);
    // A tensor that is to be a range: its offset is from the reply's begin so far.
    if (response.out().has_region()) {
      v1::TensorRegion* const region = response.mutable_out()->mutable_region();
      const std::string data = response.out().data();
      response.mutable_out()->clear_data();
      region->set_offset_bytes(begin + region->offset_bytes());
      std::memcpy(memory.Range(region->offset_bytes(), data.size()).data(), data.data(),
                  data.size());
    }
    const std::string message = response.SerializeAsString();
    const uint64_t offset = begin + shape.reply_bytes / 2;
    std::memcpy(memory.Range(offset, message.size()).data(), message.data(), message.size());
    wire::Store(&head->reply_offset, offset);
    wire::Store(&head->reply_bytes, static_cast<uint32_t>(message.size()));
    wire::Store(&head->reply_number, wire::Load(head->request_number));
    wire::Wake(&head->reply_number);
    // Until the client hangs up.
    char byte = 0;
    while (recv(connection.get(), &byte, 1, 0) > 0) {
    }
  }

  const FileDescriptor listener_;
  std::thread thread_;
};

// The outputs in the buffers after a call that had this answer.
std::vector<float> OutputsAfter(const v1::AttendResponse& response) {
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/data";
  const OneAnswer server(path + wire::kLaneSuffix, response);
  client::ClientOptions options;
  options.endpoint = "unix:" + path;
  const absl::StatusOr<std::shared_ptr<client::Lane>> opened = client::Lane::Open(options);
  EXPECT_TRUE(opened.ok()) << opened.status();
  client::Lane* const lane = opened->get();
  v1::AttendRequest request = MadeRequest();
  const auto extent = [&request](int i) { return static_cast<uint32_t>(request.q().shape(i)); };
  client::StepBuffers buffers({.token_count = extent(0),
                               .query_head_count = extent(1),
                               .kv_head_count = kMadeKvHeads,
                               .head_dim = extent(2)},
                              *opened);
  client::AttendStep step;
  step.SetBuffers(&buffers, /*store=*/false);
  const std::optional<uint32_t> slot = lane->BeginAttend(step, &request);
  EXPECT_TRUE(slot.has_value());
  const auto result = lane->EndAttend(*slot, request, &buffers,
                                      std::chrono::steady_clock::now() + std::chrono::minutes(1));
  EXPECT_TRUE(result.has_value() && result->ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffers.out().data()) % alignof(float), 0U);
  return {buffers.out().begin(), buffers.out().end()};
}

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> floats(bytes.size() / sizeof(float));
  std::memcpy(floats.data(), bytes.data(), bytes.size());
  return floats;
}

TEST(LaneReplyTest, OutputsMayBeInTheMessage) {
  const v1::AttendResponse response = MadeResponse();
  EXPECT_EQ(OutputsAfter(response), Floats(response.out().data()));
}

TEST(LaneReplyTest, OutputsMayLieAnywhereInTheArea) {
  for (const uint64_t offset : {0, 64, 2, 7}) {
    v1::AttendResponse response = MadeResponse();
    v1::TensorRegion* const region = response.mutable_out()->mutable_region();
    region->set_offset_bytes(offset);
    region->set_length_bytes(response.out().data().size());
    EXPECT_EQ(OutputsAfter(response), Floats(response.out().data())) << offset;
  }
}

}  // namespace
}  // namespace kvservice::testing
