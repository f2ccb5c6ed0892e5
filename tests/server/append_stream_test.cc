// Append streams: what they store, what holds a fast client back, and what is left when a client
// dies in the middle.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/cut_proxy.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kChunk = 32;

class AppendStreamTest : public ::testing::Test {
 protected:
  void Serve(ServedEngineOptions options = {}) {
    served_ = std::make_unique<ServedEngine>(std::move(options));
    sequences_ = v1::SequenceService::NewStub(served_->Connect());
  }

  v1::SequenceHandle NewSequence() {
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse response;
    EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), request, &response)), "OK");
    return response.sequence().handle();
  }

  v1::Sequence Get(const v1::SequenceHandle& handle) {
    v1::GetRequest request;
    *request.mutable_handle() = handle;
    v1::GetResponse response;
    EXPECT_EQ(ErrorText(sequences_->Get(NewContext().get(), request, &response)), "OK");
    return response.sequence();
  }

  void Drop(const v1::SequenceHandle& handle) {
    v1::DropRequest request;
    *request.mutable_handle() = handle;
    v1::DropResponse response;
    EXPECT_EQ(ErrorText(sequences_->Drop(NewContext().get(), request, &response)), "OK");
  }

  // The message number `index` of a prefill that goes through the layers chunk by chunk.
  v1::AppendRequest Message(const v1::SequenceHandle& handle, uint32_t index) const {
    const uint32_t position = index / 2 * kChunk;
    return MakeAppend(served_->model(), handle, index % 2, position, Counting(position, kChunk));
  }

  // Looks at the engine's numbers until they satisfy `condition`, for at most a minute.
  template <typename Condition>
  bool StatsReach(Condition condition) const {
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (std::chrono::steady_clock::now() < give_up) {
      if (condition(served_->engine()->Stats())) return true;
      std::this_thread::yield();
    }
    return false;
  }

  std::unique_ptr<ServedEngine> served_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
};

TEST_F(AppendStreamTest, StoresInOrderAndCountsRepeats) {
  Serve();
  const v1::SequenceHandle handle = NewSequence();
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto writer = sequences_->Append(context.get(), &response);
  for (uint32_t i = 0; i < 8; ++i) EXPECT_TRUE(writer->Write(Message(handle, i)));
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(writer->Write(Message(handle, i)));
  writer->WritesDone();
  EXPECT_EQ(ErrorText(writer->Finish()), "OK");
  EXPECT_EQ(response.message_count(), 11U);
  EXPECT_EQ(response.duplicate_count(), 3U);
  EXPECT_EQ(response.sequence().length_tokens(), 4 * kChunk);
  EXPECT_EQ(response.sequence().handle().id(), handle.id());
  EXPECT_EQ(response.sequence().tenant(), "");
}

TEST_F(AppendStreamTest, AnErrorEndsTheStreamAndKeepsWhatWasApplied) {
  Serve();
  const v1::SequenceHandle handle = NewSequence();
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto writer = sequences_->Append(context.get(), &response);
  writer->Write(Message(handle, 0));
  writer->Write(Message(handle, 1));
  writer->Write(Message(handle, 6));
  writer->Write(Message(handle, 2));
  writer->WritesDone();
  const RpcError error = ErrorOf(writer->Finish());
  EXPECT_EQ(error.reason, "POSITION_GAP");
  EXPECT_EQ(error.field, "position");
  EXPECT_EQ(error.metadata.at("current_length"), std::to_string(kChunk));
  EXPECT_EQ(Get(handle).length_tokens(), kChunk);
}

// The client dies after every so many bytes: in handshakes, in headers, between and inside
// messages. Whole messages stay, nothing else does.
TEST_F(AppendStreamTest, KilledClientsLeakNothing) {
  Serve();
  const size_t baseline_bytes = served_->engine()->Stats().pool_bytes_used;
  constexpr uint32_t kMessages = 6;
  // A message is about 16 KiB of keys and values; the step shares no factor with it.
  const size_t message_bytes = Message(v1::SequenceHandle(), 0).ByteSizeLong();
  bool cut_between = false;
  for (size_t cut = 1; cut < (kMessages + 1) * message_bytes; cut += 6'151) {
    SCOPED_TRACE(cut);
    const v1::SequenceHandle handle = NewSequence();
    const std::string proxy_path = served_->folder() + "/proxy" + std::to_string(cut);
    grpc::Status status;
    {
      const CutProxy proxy(proxy_path, served_->server()->endpoints()[0].path, cut);
      const auto doomed = v1::SequenceService::NewStub(
          grpc::CreateChannel("unix:" + proxy_path, grpc::InsecureChannelCredentials()));
      v1::AppendResponse response;
      const auto context = NewContext();
      const auto writer = doomed->Append(context.get(), &response);
      for (uint32_t i = 0; i < kMessages && writer->Write(Message(handle, i)); ++i) {
      }
      writer->WritesDone();
      status = writer->Finish();
    }
    const v1::Sequence left = Get(handle);
    EXPECT_EQ(left.length_tokens() % kChunk, 0U);
    EXPECT_EQ(left.length_max_tokens() % kChunk, 0U);
    EXPECT_LE(left.length_max_tokens() - left.length_tokens(), kChunk);
    cut_between = cut_between || (!status.ok() && left.length_max_tokens() > 0);
    Drop(handle);
    EXPECT_TRUE(StatsReach([&](const EngineStats& stats) {
      return stats.pool_bytes_used == baseline_bytes && stats.sequences == 0;
    }));
  }
  EXPECT_TRUE(cut_between);
}

// Nobody drops the sequence of a dead client: its lease does.
TEST_F(AppendStreamTest, LeasesFreeWhatDeadClientsLeave) {
  Serve();
  const v1::SequenceHandle handle = NewSequence();
  {
    const auto doomed = v1::SequenceService::NewStub(served_->Connect());
    v1::AppendResponse response;
    const auto context = NewContext();
    const auto writer = doomed->Append(context.get(), &response);
    EXPECT_TRUE(writer->Write(Message(handle, 0)));
    context->TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_EQ(served_->engine()->Stats().sequences, 1U);
  served_->clock()->AdvanceMs(TestEngine::SmallOptions().lease_max_ms + 1);
  EXPECT_TRUE(StatsReach([](const EngineStats& stats) {
    return stats.pool_bytes_used == 0 && stats.sequences == 0 && stats.leases_expired_total == 1;
  }));
}

// Holds every append until it is let go.
class HeldDevice final : public DeviceWrapper {
 public:
  HeldDevice(std::unique_ptr<Device> inner, std::shared_future<void> go)
      : DeviceWrapper(std::move(inner)), go_(std::move(go)) {}
  void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override {
    go_.wait();
    DeviceWrapper::Append(layout, slices);
  }

 private:
  const std::shared_future<void> go_;
};

// While the engine is busy the server reads nothing further, so a client can have no more than the
// transport's windows under way.
TEST_F(AppendStreamTest, AFastClientIsHeldBack) {
  std::promise<void> go;
  ServedEngineOptions options;
  options.engine.pool_bytes = size_t{64} << 20;
  options.device =
      std::make_unique<HeldDevice>(*NewDevice("reference", {}), go.get_future().share());
  Serve(std::move(options));
  const v1::SequenceHandle handle = NewSequence();
  constexpr uint32_t kTokens = 2048;
  constexpr uint32_t kMessagesMax = 64;
  const size_t message_bytes =
      MakeAppend(served_->model(), handle, 0, 0, Counting(0, kTokens)).ByteSizeLong();

  grpc::CompletionQueue queue;
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto writer = sequences_->AsyncAppend(context.get(), &response, &queue, nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  uint32_t written = 0;
  const auto write_next = [&] {
    // The same tokens again and again: repeats store nothing.
    writer->Write(MakeAppend(served_->model(), handle, 0, 0, Counting(0, kTokens)), nullptr);
  };
  write_next();
  // Held back: a write that does not end although nothing else keeps the machine busy.
  while (written < kMessagesMax &&
         queue.AsyncNext(&tag, &ok, std::chrono::system_clock::now() + std::chrono::seconds(1)) ==
             grpc::CompletionQueue::GOT_EVENT) {
    ++written;
    write_next();
  }
  EXPECT_LT(written * message_bytes, size_t{16} << 20);
  go.set_value();
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::Status status;
  writer->WritesDone(nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  writer->Finish(&status, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(ErrorText(status), "OK");
  EXPECT_EQ(response.message_count(), written + 1);
  EXPECT_EQ(response.duplicate_count(), written);
  queue.Shutdown();
}

}  // namespace
}  // namespace kvservice::testing
