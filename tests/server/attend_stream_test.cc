// Attention on a stream: answers of calls, errors of calls, and ends of streams.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_call.h"
#include "tests/server/raw_lane.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 30;

class AttendStreamTest : public ::testing::Test {
 protected:
  using Stream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;

  AttendStreamTest()
      : served_(Options()), attention_(v1::AttentionService::NewStub(served_.Connect())) {
    const auto sequences = v1::SequenceService::NewStub(served_.Connect());
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), request, &created)), "OK");
    handle_ = created.sequence().handle();
    v1::AppendResponse response;
    const auto context = NewContext();
    const auto writer = sequences->Append(context.get(), &response);
    EXPECT_TRUE(writer->Write(MakeAppend(served_.model(), handle_, 0, 0, Counting(0, kLength))));
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
  }
  ServedEngineOptions Options() {
    ServedEngineOptions options;
    options.device = brake_.On(*NewDevice("reference", {}));
    return options;
  }

  // Reads with the query of the word at `position`.
  v1::AttendRequest Request(uint64_t step_id, uint32_t position) const {
    v1::AttendRequest request = MakeAttend(served_.model(), handle_, 0, position, {position});
    request.clear_k();
    request.clear_v();
    request.set_step_id(step_id);
    return request;
  }

  Brake brake_;
  ServedEngine served_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  v1::SequenceHandle handle_;
};

TEST_F(AttendStreamTest, AnswersAreThoseOfUnaryCalls) {
  const auto context = NewContext();
  const auto stream = attention_->AttendStream(context.get());
  for (uint32_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(stream->Write(Request(i, i)));
    v1::AttendResponse streamed;
    ASSERT_TRUE(stream->Read(&streamed));
    v1::AttendResponse unary;
    ASSERT_EQ(ErrorText(attention_->Attend(NewContext().get(), Request(i, i), &unary)), "OK");
    for (v1::AttendResponse* reply : {&unary, &streamed}) {
      reply->clear_call_number();
      reply->clear_queue_ns();
      reply->clear_service_ns();
    }
    EXPECT_EQ(streamed.SerializeAsString(), unary.SerializeAsString());
  }
  stream->WritesDone();
  EXPECT_EQ(ErrorText(stream->Finish()), "OK");
}

TEST_F(AttendStreamTest, ErrorsOfCallsAreAnswersAndTheStreamGoesOn) {
  const auto context = NewContext();
  const auto stream = attention_->AttendStream(context.get());
  v1::AttendRequest bad = Request(1, 3);
  bad.mutable_q()->mutable_data()->pop_back();
  v1::AttendRequest region = Request(2, 3);
  region.mutable_q()->mutable_region();
  v1::AttendRequest layer = Request(3, 3);
  layer.set_layer(9);
  const std::vector<std::pair<v1::AttendRequest, std::string>> cases = {
      {bad, "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.data"},
      {region, "INVALID_ARGUMENT TENSOR_REGION_NOT_SERVED q.region"},
      {layer, "INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer"}};
  for (const auto& [request, expected] : cases) {
    ASSERT_TRUE(stream->Write(request));
    v1::AttendResponse response;
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.step_id(), request.step_id());
    EXPECT_EQ(ErrorText(response.error()), expected);
    EXPECT_EQ(response.results_size(), 0);
  }
  ASSERT_TRUE(stream->Write(Request(4, 3)));
  v1::AttendResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_FALSE(response.has_error());
  EXPECT_EQ(RowErrorText(response.results(0)), "OK");
}

// The client writes on; the server reads no more than it may have under way.
TEST_F(AttendStreamTest, AWindowOfCallsIsUnderWay) {
  constexpr uint32_t kCalls = 50;
  brake_.Set(true);
  const auto context = NewContext();
  const auto stream = attention_->AttendStream(context.get());
  const uint64_t before = served_.engine()->Stats().calls_total;
  std::thread writer([&] {
    for (uint32_t i = 0; i < kCalls; ++i) EXPECT_TRUE(stream->Write(Request(i, i % kLength)));
    stream->WritesDone();
  });
  EXPECT_TRUE(Eventually(
      [&] { return served_.engine()->Stats().calls_total == before + kStreamCallsMax; }));
  // The server is not asleep meanwhile, and the window stays shut.
  for (int i = 0; i < 20; ++i) {
    v1::AttendRequest bad = Request(0, 0);
    bad.clear_rows();
    v1::AttendResponse refused;
    EXPECT_FALSE(attention_->Attend(NewContext().get(), bad, &refused).ok());
  }
  EXPECT_EQ(served_.engine()->Stats().calls_total, before + kStreamCallsMax);
  brake_.Set(false);
  std::set<uint64_t> answered;
  v1::AttendResponse response;
  while (stream->Read(&response)) {
    EXPECT_FALSE(response.has_error());
    answered.insert(response.step_id());
  }
  writer.join();
  EXPECT_EQ(answered.size(), kCalls);
  EXPECT_EQ(ErrorText(stream->Finish()), "OK");
}

TEST_F(AttendStreamTest, AMessageThatDoesNotParseEndsTheStream) {
  EXPECT_EQ(ErrorText(CallRaw(served_.Connect(), "/kvservice.v1.AttentionService/AttendStream",
                              BytesOf("\xff\xff\xff"))),
            "INVALID_ARGUMENT MESSAGE_MALFORMED");
}

TEST_F(AttendStreamTest, CancelsInMidCallLeaveNothing) {
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {
    const auto context = NewContext();
    const auto stream = attention_->AttendStream(context.get());
    const uint32_t count = random() % 6;
    for (uint32_t call = 0; call < count; ++call) stream->Write(Request(call, call));
    if (random() % 2 == 0) {
      v1::AttendResponse response;
      if (count > 0) stream->Read(&response);
    }
    context->TryCancel();
    stream->Finish();
  }
  EXPECT_TRUE(Eventually([this] { return served_.engine()->Stats().queue_calls == 0; }));
  v1::AttendResponse response;
  EXPECT_EQ(ErrorText(attention_->Attend(NewContext().get(), Request(1, 1), &response)), "OK");
}

// A stream that stays open for ever must not make a drain wait for its grace.
TEST_F(AttendStreamTest, DrainEndsIdleStreamsAndAnswersCallsUnderWay) {
  const auto idle_context = NewContext();
  const auto idle = attention_->AttendStream(idle_context.get());
  ASSERT_TRUE(idle->Write(Request(1, 1)));
  v1::AttendResponse response;
  ASSERT_TRUE(idle->Read(&response));
  const auto busy_context = NewContext();
  const auto busy = attention_->AttendStream(busy_context.get());
  brake_.Set(true);
  const int calls = brake_.call_count();
  ASSERT_TRUE(busy->Write(Request(2, 2)));
  ASSERT_TRUE(Eventually([&] { return brake_.call_count() > calls; }));
  std::thread drain([this] { served_.server()->Drain(3'600'000); });
  // Refused at once, with or without a drain.
  v1::AttendRequest bad = Request(4, 4);
  bad.clear_rows();
  EXPECT_TRUE(Eventually([&] {
    return idle->Write(bad) && idle->Read(&response) &&
           ErrorText(response.error()) == "UNAVAILABLE DRAINING";
  }));
  brake_.Set(false);
  ASSERT_TRUE(busy->Read(&response));
  EXPECT_EQ(response.step_id(), 2U);
  EXPECT_FALSE(response.has_error());
  drain.join();
  EXPECT_FALSE(idle->Read(&response));
  EXPECT_FALSE(idle->Finish().ok());
}

}  // namespace
}  // namespace kvservice::testing
