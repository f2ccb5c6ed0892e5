// Workers of one server: their calls of one layer that wait at the same time are one batch of the
// device, whatever way they came, and a step does not wait for others' prompts.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_lane.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 70;

class BatchingTest : public ::testing::Test {
 protected:
  BatchingTest() : served_(Options()) {
    for (const auto& channel : {served_.Connect(), served_.ConnectAsOther()}) {
      channels_.push_back(channel);
      const auto sequences = v1::SequenceService::NewStub(channel);
      v1::CreateRequest request;
      request.set_model(kModel);
      v1::CreateResponse created;
      EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), request, &created)), "OK");
      handles_.push_back(created.sequence().handle());
      v1::AppendResponse response;
      const auto context = NewContext();
      const auto writer = sequences->Append(context.get(), &response);
      EXPECT_TRUE(
          writer->Write(MakeAppend(served_.model(), handles_.back(), 0, 0, Counting(0, kLength))));
      writer->WritesDone();
      EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    }
  }
  // A device that writes down the rows of its batches.
  ServedEngineOptions Options() {
    ServedEngineOptions options;
    auto watched = std::make_unique<WatchedDevice>(*NewDevice("reference", {}));
    watched->set_before([this](const LayerShape&, absl::Span<AttendRow> rows) {
      const std::lock_guard<std::mutex> lock(mutex_);
      batches_.push_back(rows.size());
    });
    options.device = brake_.On(std::move(watched));
    options.server.lanes_max = 4;
    options.server.lane_bytes_max = size_t{1} << 20;
    return options;
  }
  std::vector<size_t> batches() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return batches_;
  }
  uint32_t waiting() { return served_.engine()->Stats().queue_calls; }
  v1::AttendRequest Step(size_t worker, uint32_t count = 1) const {
    return MakeAttend(served_.model(), handles_[worker], 0, kLength - count,
                      Counting(kLength - count, count));
  }

  Brake brake_;
  std::mutex mutex_;
  std::vector<size_t> batches_;  // guarded by mutex_
  ServedEngine served_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<v1::SequenceHandle> handles_;
};

// A unary call that its test waits for later.
class Pending {
 public:
  Pending(const std::shared_ptr<grpc::Channel>& channel, const v1::AttendRequest& request)
      : stub_(v1::AttentionService::NewStub(channel)), context_(NewContext()) {
    call_ = stub_->AsyncAttend(context_.get(), request, &queue_);
    call_->Finish(&response_, &status_, this);
  }
  std::string Answer() {
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue_.Next(&tag, &ok));
    return status_.ok() ? RowErrorText(response_.results(0)) : ErrorText(status_);
  }

 private:
  const std::unique_ptr<v1::AttentionService::Stub> stub_;
  const std::unique_ptr<grpc::ClientContext> context_;
  grpc::CompletionQueue queue_;
  v1::AttendResponse response_;
  grpc::Status status_;
  std::unique_ptr<grpc::ClientAsyncResponseReader<v1::AttendResponse>> call_;
};

TEST_F(BatchingTest, WhatWaitsForALayerIsOneBatch) {
  const RawLane lane(served_.server()->endpoints()[0]);
  brake_.Set(true);
  Pending first(channels_[0], Step(0));
  ASSERT_TRUE(Eventually([&] { return brake_.call_count() == 1; })) << "it waits for nobody";
  Pending second(channels_[0], Step(0));
  Pending other_tenants(channels_[1], Step(1));
  lane.PutMessage(0, lane.Place(0, Step(0)).SerializeAsString());
  lane.Submit(0);
  ASSERT_TRUE(Eventually([&] { return waiting() == 3; }));
  brake_.Set(false);
  EXPECT_EQ(first.Answer(), "OK");
  EXPECT_EQ(second.Answer(), "OK");
  EXPECT_EQ(other_tenants.Answer(), "OK");
  ASSERT_TRUE(lane.Wait(0));
  EXPECT_EQ(lane.Answer(0), "OK");
  // Rows of one sequence never share a batch, so the two workers' rows are one and the third row
  // is another.
  EXPECT_EQ(batches(), (std::vector<size_t>{1, 2, 1}));
}

// A chunk of a prompt that came before a step is stored behind it. Both bring a token for the same
// place, so that the answers tell which was first.
TEST_F(BatchingTest, StepsDoNotWaitForPrompts) {
  brake_.Set(true);
  Pending running(channels_[0], Step(0));
  ASSERT_TRUE(Eventually([&] { return brake_.call_count() == 1; }));
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto sequences = v1::SequenceService::NewStub(channels_[1]);
  const auto writer = sequences->Append(context.get(), &response);
  EXPECT_TRUE(writer->Write(
      MakeAppend(served_.model(), handles_[1], 0, kLength, Counting(kLength + 7, 1))));
  ASSERT_TRUE(Eventually([&] { return waiting() == 1; }));
  Pending step(channels_[1],
               MakeAttend(served_.model(), handles_[1], 0, kLength, Counting(kLength, 1)));
  ASSERT_TRUE(Eventually([&] { return waiting() == 2; }));
  brake_.Set(false);
  EXPECT_EQ(running.Answer(), "OK");
  EXPECT_EQ(step.Answer(), "OK");
  writer->WritesDone();
  EXPECT_EQ(ErrorText(writer->Finish()), "FAILED_PRECONDITION APPEND_CONFLICT position");
}

}  // namespace
}  // namespace kvservice::testing
