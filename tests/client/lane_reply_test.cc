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
#include "client/status.h"
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
    // Tensors that are to be ranges: their offset is from the reply's begin so far.
    for (v1::Tensor* const tensor : {response.mutable_lse(), response.mutable_out()}) {
      if (!tensor->has_region()) continue;
      const uint64_t offset = begin + tensor->region().offset_bytes();
      const std::string data = tensor->data();
      tensor->clear_data();
      tensor->mutable_region()->set_offset_bytes(offset);
      std::memcpy(memory.Range(offset, data.size()).data(), data.data(), data.size());
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

// A client of its own for one call that has this answer.
class AnsweredCall {
 public:
  explicit AnsweredCall(const v1::AttendResponse& response)
      : server_(folder_.path() + "/data" + wire::kLaneSuffix, response) {
    client::ClientOptions options;
    options.endpoint = "unix:" + folder_.path() + "/data";
    lane_ = *client::Lane::Open(options);
    const auto extent = [this](int i) { return static_cast<uint32_t>(request_.q().shape(i)); };
    buffers_ =
        std::make_unique<client::StepBuffers>(client::StepShape{.token_count = extent(0),
                                                                .query_head_count = extent(1),
                                                                .kv_head_count = kMadeKvHeads,
                                                                .head_dim = extent(2)},
                                              lane_);
    step_.SetBuffers(buffers_.get(), /*store=*/false);
  }

  // The outputs in the buffers after it.
  std::vector<float> Outputs() {
    const std::optional<uint32_t> slot = lane_->BeginAttend(step_, &request_);
    EXPECT_TRUE(slot.has_value());
    const auto result = lane_->EndAttend(*slot, request_, buffers_.get(), Deadline());
    EXPECT_TRUE(result.has_value() && result->ok());
    const absl::Span<const float> out = buffers_->out();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(out.data()) % alignof(float), 0U);
    return {out.begin(), out.end()};
  }
  // The field that is wrong with it when it was prepared; else "" and outputs that are where the
  // client said.
  std::string PreparedProblem() {
    const absl::StatusOr<client::PreparedSlot> slot = lane_->PrepareAttend(step_, &request_);
    EXPECT_TRUE(slot.ok()) << slot.status();
    lane_->RingPrepared(slot->index);
    const auto result = lane_->EndPrepared(slot->index, request_, buffers_.get(), Deadline());
    if (result.ok()) {
      EXPECT_EQ(buffers_->out(), slot->out);
      return "";
    }
    EXPECT_EQ(client::ReasonOf(result.status()), client::kReplyMalformed);
    return client::FieldOf(result.status());
  }

 private:
  static std::chrono::steady_clock::time_point Deadline() {
    return std::chrono::steady_clock::now() + std::chrono::minutes(1);
  }

  const TemporaryFolder folder_;
  const OneAnswer server_;
  v1::AttendRequest request_ = MadeRequest();
  client::AttendStep step_;
  // Gone before the server, which waits for that.
  std::shared_ptr<client::Lane> lane_;
  std::unique_ptr<client::StepBuffers> buffers_;
};

std::vector<float> OutputsAfter(const v1::AttendResponse& response) {
  return AnsweredCall(response).Outputs();
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

// Whoever waits for a prepared call reads outputs without its message.
TEST(LaneReplyTest, OutputsOfPreparedCallsLieWhereTheLayoutSays) {
  const auto problem = [](std::optional<uint64_t> lse, std::optional<uint64_t> out) {
    v1::AttendResponse response = MadeResponse();
    const auto place = [](std::optional<uint64_t> offset, v1::Tensor* tensor) {
      if (!offset.has_value()) return;
      tensor->mutable_region()->set_offset_bytes(*offset);
      tensor->mutable_region()->set_length_bytes(tensor->data().size());
    };
    place(lse, response.mutable_lse());
    place(out, response.mutable_out());
    return AnsweredCall(response).PreparedProblem();
  };
  EXPECT_EQ(problem(0, 64), "");
  EXPECT_EQ(problem(0, 128), "out");
  EXPECT_EQ(problem(0, std::nullopt), "out");
  EXPECT_EQ(problem(256, 64), "lse");
  EXPECT_EQ(problem(std::nullopt, 64), "lse");
}

}  // namespace
}  // namespace kvservice::testing
