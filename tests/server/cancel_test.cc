// Clients that give up: calls cancelled at random moments by every way, lanes whose memory goes
// while the server works on what is in it. Nothing is left behind, and the server serves on.
//
// KVSERVICE_CANCELS says how many, KVSERVICE_CANCEL_SEED which.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_lane.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 70;

uint32_t Setting(const char* name, uint32_t value) {
  const char* const text = std::getenv(name);
  return text == nullptr ? value : static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
}

size_t LaneMappings() {
  size_t count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) count += line.find("memfd:") != line.npos;
  return count;
}
size_t Descriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

class CancelTest : public ::testing::Test {
 protected:
  CancelTest()
      : served_(Options()),
        channel_(served_.Connect()),
        attention_(v1::AttentionService::NewStub(channel_)),
        sequences_(v1::SequenceService::NewStub(channel_)) {
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), request, &created)), "OK");
    handle_ = created.sequence().handle();
    v1::AppendResponse response;
    const auto context = NewContext();
    const auto writer = sequences_->Append(context.get(), &response);
    for (uint32_t layer = 0; layer < 2; ++layer) EXPECT_TRUE(writer->Write(Append(layer, 0)));
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
  }
  ServedEngineOptions Options() {
    ServedEngineOptions options;
    options.device = brake_.On(*NewDevice("reference", {}));
    options.server.lanes_max = 4;
    options.server.lane_bytes_max = size_t{1} << 20;
    return options;
  }

  v1::AppendRequest Append(uint32_t layer, uint32_t position) const {
    return MakeAppend(served_.model(), handle_, layer, position,
                      Counting(position, kLength - position));
  }
  v1::AttendRequest Attend() { return MakeAttend(served_.model(), handle_, 0, 40, {40}); }
  // Something between nothing and a few turns of other threads.
  void Dawdle() {
    for (uint32_t turns = random_() % 16; turns > 0; --turns) std::this_thread::yield();
  }

  void CancelUnary() {
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    v1::AttendResponse response;
    grpc::Status status;
    const auto call = attention_->AsyncAttend(&context, Attend(), &queue);
    call->Finish(&response, &status, this);
    Dawdle();
    context.TryCancel();
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue.Next(&tag, &ok));
    // An engine that gets no processor for a while has its queue full of calls nobody waits for.
    EXPECT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::CANCELLED ||
                status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED)
        << status.error_message();
  }

  void CancelStream() {
    grpc::ClientContext context;
    const auto stream = attention_->AttendStream(&context);
    // With none there would be no answer to read.
    for (uint32_t i = 1 + random_() % 6; i > 0; --i) stream->Write(Attend());
    Dawdle();
    v1::AttendResponse response;
    if (!is_braked_ && random_() % 4 == 0) stream->Read(&response);
    context.TryCancel();
    EXPECT_FALSE(stream->Finish().ok());
  }

  void CancelAppend() {
    grpc::ClientContext context;
    v1::AppendResponse response;
    const auto writer = sequences_->Append(&context, &response);
    for (uint32_t i = random_() % 4; i > 0; --i)
      writer->Write(Append(random_() % 2, random_() % kLength));
    Dawdle();
    context.TryCancel();
    writer->Finish();
  }

  void CancelLane() {
    RawLane lane(served_.server()->endpoints()[0]);
    for (uint32_t slot = random_() % 3; slot > 0; --slot) {
      const bool appends = random_() % 2 == 0;
      const std::string message =
          appends ? lane.Place(slot - 1, Append(0, kLength - 10)).SerializeAsString()
                  : lane.Place(slot - 1, Attend()).SerializeAsString();
      wire::Store(&lane.head(slot - 1)->request_method,
                  appends ? wire::kLaneAppend : wire::kLaneAttend);
      lane.PutMessage(slot - 1, message);
      lane.Submit(slot - 1);
    }
    Dawdle();
    if (random_() % 2 == 0) lane.Hang();
    // Connections that are gone are noticed at a pace of the clock.
    served_.clock()->AdvanceMs(100);
  }

  Brake brake_;
  ServedEngine served_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
  v1::SequenceHandle handle_;
  std::mt19937 random_;
  bool is_braked_ = false;
};

TEST_F(CancelTest, StormsOfCancelsLeaveNothing) {
  const uint32_t count = Setting("KVSERVICE_CANCELS", 2'000);
  const uint32_t seed = Setting("KVSERVICE_CANCEL_SEED", 5);
  SCOPED_TRACE(seed);
  random_.seed(seed);
  v1::AttendResponse before;
  ASSERT_EQ(ErrorText(attention_->Attend(NewContext().get(), Attend(), &before)), "OK");
  const size_t descriptors = Descriptors();
  for (uint32_t i = 0; i < count; ++i) {
    // Some of them while the engine is busy with an earlier one.
    is_braked_ = random_() % 8 == 0;
    brake_.Set(is_braked_);
    switch (random_() % 4) {
      case 0:
        CancelUnary();
        break;
      case 1:
        CancelStream();
        break;
      case 2:
        brake_.Set(false);  // a writer's flow control would wait for the engine
        CancelAppend();
        break;
      default:
        CancelLane();
    }
    brake_.Set(false);
  }
  EXPECT_TRUE(Eventually([&] { return LaneMappings() == 0 && Descriptors() <= descriptors; }))
      << LaneMappings() << " mappings, " << Descriptors() << " descriptors, " << descriptors
      << " before";
  EXPECT_TRUE(Eventually([&] { return served_.engine()->Stats().queue_calls == 0; }));
  v1::AttendResponse after;
  ASSERT_EQ(ErrorText(attention_->Attend(NewContext().get(), Attend(), &after)), "OK");
  EXPECT_EQ(after.out().data(), before.out().data());
  // A drain does not wait for calls that nobody has any more.
  served_.server()->Drain(60'000);
}

}  // namespace
}  // namespace kvservice::testing
