// Which way a client's calls take, and that they arrive whatever becomes of the faster one.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/client.h"
#include "client/status.h"
#include "tests/client/lane_case.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::Transport;

constexpr double kOutTolerance = 1e-10;

class LaneClientTest : public LaneCase {
 protected:
  // A step that reads with the queries of the words from `position` on.
  struct Asked {
    std::vector<std::byte> q;
    client::AttendRow row;
    client::AttendStep step;
  };
  std::unique_ptr<Asked> Ask(const client::Sequence& sequence, uint32_t position,
                             uint32_t count = 1) const {
    auto asked = std::make_unique<Asked>();
    const Words words = Counting(position, count);
    asked->q = PartBytes(layout(), DType::kFloat32, Part::kQuery, 0, words);
    asked->row = {.sequence = &sequence, .position = position, .query_count = count};
    asked->step.rows = {&asked->row, 1};
    asked->step.return_selected = true;
    asked->step.q = {.dtype = client::DType::kFloat32,
                     .token_count = count,
                     .head_count = layout().query_head_count,
                     .head_dim = layout().head_dim,
                     .bytes = asked->q};
    return asked;
  }
  // Compares the answer, if there is one, and says which way it came.
  absl::StatusOr<Transport> Judge(const absl::StatusOr<client::AttendResult>& result,
                                  uint32_t position) const {
    if (!result.ok()) return result.status();
    EXPECT_TRUE(result->rows[0].status.ok()) << result->rows[0].status;
    const DenseAnswer dense = Dense(position);
    const auto out = absl::MakeConstSpan(result->rows[0].out).first(dense.out.size());
    EXPECT_LT(NormalizedSquaredError(out, dense.out), kOutTolerance);
    return result->transport;
  }
  absl::StatusOr<Transport> Attend(Client* from, const client::Sequence& sequence,
                                   uint32_t position, uint32_t count = 1) const {
    return Judge(from->Attend(Ask(sequence, position, count)->step), position);
  }
};

TEST_F(LaneClientTest, TheFasterWayIsTakenWhereThereIsOne) {
  const auto client = Connect(Options());
  EXPECT_EQ(client->transport(), Transport::kLane);
  const client::Sequence sequence = Create(client.get(), 20);
  EXPECT_EQ(*Attend(client.get(), sequence, 19), Transport::kLane);
  for (const Transport transport : {Transport::kUnary, Transport::kStream}) {
    client::ClientOptions other = Options();
    other.transport = transport;
    const auto one = Connect(other);
    EXPECT_EQ(one->transport(), transport);
    client::Sequence adopted = one->Adopt(sequence.id(), sequence.generation());
    EXPECT_EQ(*Attend(one.get(), adopted, 19), transport);
    adopted.Detach();
  }
}

TEST_F(LaneClientTest, WithoutLanesItIsAStream) {
  Serve(0);
  const auto client = Connect(Options());
  EXPECT_EQ(client->transport(), Transport::kStream);
  const client::Sequence sequence = Create(client.get(), 20);
  EXPECT_EQ(*Attend(client.get(), sequence, 19), Transport::kStream);
  client::ClientOptions lane = Options();
  lane.transport = Transport::kLane;
  absl::Status refused = Client::Connect(lane).status();
  EXPECT_EQ(client::ReasonOf(refused), "LANE_UNAVAILABLE");
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LaneClientTest, WhatTheServerRefusesIsAStream) {
  const auto first = Connect(Options());
  const auto second = Connect(Options());
  const auto third = Connect(Options());
  EXPECT_EQ(second->transport(), Transport::kLane);
  EXPECT_EQ(third->transport(), Transport::kStream);
  client::ClientOptions lane = Options();
  lane.transport = Transport::kLane;
  EXPECT_EQ(client::ReasonOf(Client::Connect(lane).status()), "LANES_EXHAUSTED");
  lane.lane.call_bytes_max = size_t{1} << 30;
  EXPECT_FALSE(Client::Connect(lane).ok());
}

TEST_F(LaneClientTest, CallsThatDoNotFitAreStreamed) {
  client::ClientOptions options = Options();
  options.lane.call_bytes_max = 4096;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), 200);
  EXPECT_EQ(*Attend(client.get(), sequence, 199), Transport::kLane);
  // Its tensors and outputs fit, what it selected does not.
  EXPECT_EQ(*Attend(client.get(), sequence, 197, 3), Transport::kStream);
  EXPECT_EQ(*Attend(client.get(), sequence, 192, 8), Transport::kStream);
  EXPECT_EQ(*Attend(client.get(), sequence, 199), Transport::kLane);
}

TEST_F(LaneClientTest, CallsWithoutASlotAreStreamed) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 1;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), 20);
  brake_.Set(true);
  std::optional<Transport> first;
  std::optional<Transport> second;
  std::thread one([&] { first = *Attend(client.get(), sequence, 19); });
  ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
  const uint64_t calls = served_->engine()->Stats().calls_total;
  std::thread two([&] { second = *Attend(client.get(), sequence, 18); });
  ASSERT_TRUE(Eventually([&] { return served_->engine()->Stats().calls_total > calls; }));
  brake_.Set(false);
  one.join();
  two.join();
  EXPECT_EQ(first, Transport::kLane);
  EXPECT_EQ(second, Transport::kStream);
}

TEST_F(LaneClientTest, TwoMicroBatchesAreInFlight) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), 20);
  std::vector<std::thread> threads;
  std::vector<int> lane_calls(2);
  for (size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      for (uint32_t n = 0; n < 200; ++n) {
        lane_calls[i] += *Attend(client.get(), sequence, (n * 7 + i) % 20) == Transport::kLane;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(lane_calls[0] + lane_calls[1], 400);
}

// One thread has several calls in flight: as many as there are slots in shared memory, more by
// threads.
TEST_F(LaneClientTest, CallsNeedNotBeWaitedFor) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 2;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), 20);
  brake_.Set(true);
  std::vector<std::unique_ptr<Asked>> asked;
  std::vector<client::PendingAttend> pending;
  for (uint32_t position = 10; position < 13; ++position) {
    asked.push_back(Ask(sequence, position));
    pending.push_back(client->AttendAsync(asked.back()->step));
  }
  ASSERT_TRUE(Eventually([&] { return served_->engine()->Stats().calls_total >= 3; }));
  brake_.Set(false);
  EXPECT_EQ(*Judge(pending[2].Wait(), 12), Transport::kStream);
  EXPECT_EQ(*Judge(pending[0].Wait(), 10), Transport::kLane);
  EXPECT_EQ(*Judge(pending[1].Wait(), 11), Transport::kLane);
  // What is wrong with a step is said by Wait.
  client::AttendStep empty;
  EXPECT_EQ(client->AttendAsync(empty).Wait().status(), client->Attend(empty).status());
  const auto other = Connect(options);
  const client::Sequence foreign = Create(other.get(), 20);
  EXPECT_EQ(client->AttendAsync(Ask(foreign, 3)->step).Wait().status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(LaneClientTest, PendingCallsMayBeGivenUp) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 1;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), 20);
  brake_.Set(true);
  const auto asked = Ask(sequence, 10);
  { const client::PendingAttend pending = client->AttendAsync(asked->step); }
  ASSERT_TRUE(Eventually([&] { return brake_.call_count() == 1; }));
  brake_.Set(false);
  // The slot is free once the answer is there.
  EXPECT_TRUE(Eventually([&] { return *Attend(client.get(), sequence, 19) == Transport::kLane; }));
}

TEST_F(LaneClientTest, AppendsTakeTheLaneWhereItHasRoom) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 4;
  options.lane.call_bytes_max = 32 << 10;
  const auto client = Connect(options);
  constexpr uint32_t kCount = 1000;  // in many messages: a slot has room for 62 tokens or so
  absl::StatusOr<client::Sequence> sequence = client->CreateSequence({.model = kModel});
  ASSERT_TRUE(sequence.ok());
  const Words words = Counting(0, kCount);
  const std::vector<std::byte> k = PartBytes(layout(), layout().dtype, Part::kKey, 0, words);
  const std::vector<std::byte> v = PartBytes(layout(), layout().dtype, Part::kValue, 0, words);
  // The lane's other half is for calls: the second writer has to take another way.
  client::AppendWriter first = sequence->Append();
  client::AppendWriter second = sequence->Append();
  ASSERT_TRUE(first.Write(0, 0, View(k, kCount), View(v, kCount)).ok());
  EXPECT_EQ(*Attend(client.get(), *sequence, 0), Transport::kLane);
  ASSERT_TRUE(first.Commit().ok());
  ASSERT_TRUE(first.Write(0, 0, View(k, kCount), View(v, kCount)).ok());
  ASSERT_TRUE(second.Write(0, 0, View(k, kCount), View(v, kCount)).ok());
  const absl::StatusOr<client::Receipt> committed = first.Commit();
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(committed->transport, Transport::kLane);
  EXPECT_EQ(committed->length_max_tokens, kCount);
  EXPECT_GT(committed->message_count, 10U);
  EXPECT_EQ(committed->duplicate_count, committed->message_count / 2);
  const absl::StatusOr<client::Receipt> streamed = second.Commit();
  ASSERT_TRUE(streamed.ok()) << streamed.status();
  EXPECT_EQ(streamed->transport, Transport::kStream);
  EXPECT_EQ(streamed->duplicate_count, streamed->message_count);
  // Its slots are free again.
  ASSERT_TRUE(second.Write(0, 0, View(k, kCount), View(v, kCount)).ok());
  EXPECT_EQ(second.Commit()->transport, Transport::kLane);
  for (const uint32_t position : {0U, 64U, kCount - 1}) {
    EXPECT_TRUE(Attend(client.get(), *sequence, position).ok());
  }
}

TEST_F(LaneClientTest, AppendsTellTheirErrorsAndGoOnElsewhere) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), 20);
  const Words words = Counting(22, 8);
  const std::vector<std::byte> k = PartBytes(layout(), layout().dtype, Part::kKey, 0, words);
  const std::vector<std::byte> v = PartBytes(layout(), layout().dtype, Part::kValue, 0, words);
  {
    client::AppendWriter writer = sequence.Append();
    EXPECT_TRUE(writer.Write(0, 22, View(k, 8), View(v, 8)).ok());
    EXPECT_EQ(client::ReasonOf(writer.Commit().status()), "POSITION_GAP");
    EXPECT_EQ(client::ReasonOf(writer.Write(0, 20, View(k, 8), View(v, 8))), "POSITION_GAP");
  }
  {
    client::AppendWriter abandoned = sequence.Append();
    EXPECT_TRUE(abandoned.Write(0, 20, View(k, 8), View(v, 8)).ok());
  }
  client::AppendWriter again = sequence.Append();
  EXPECT_TRUE(again.Write(0, 20, View(k, 8), View(v, 8)).ok());
  const absl::StatusOr<client::Receipt> receipt = again.Commit();
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length_max_tokens, 28U);
  EXPECT_EQ(receipt->transport, Transport::kLane);
}

TEST_F(LaneClientTest, TimeThatIsOverCostsASlotUntilTheAnswer) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 1;
  options.deadlines.data = std::chrono::milliseconds(50);
  const auto hasty = Connect(options);
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), 20);
  const client::Sequence adopted = hasty->Adopt(sequence.id(), sequence.generation());
  brake_.Set(true);
  EXPECT_EQ(Attend(hasty.get(), adopted, 19).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(hasty->transport(), Transport::kLane);
  brake_.Set(false);
  EXPECT_TRUE(Eventually([&] {
    const absl::StatusOr<Transport> way = Attend(hasty.get(), adopted, 19);
    return way.ok() && *way == Transport::kLane;
  }));
}

// Calls whose tensors are the library's: in shared memory, and where there is none.
TEST_F(LaneClientTest, StepBuffersTakeTensorsAndLeaveOutputsInPlace) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 1;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), 20);
  const auto step = [&](client::StepBuffers* buffers, uint32_t position, bool store) {
    Fill(position, buffers);
    const std::vector<std::byte> k(buffers->k().begin(), buffers->k().end());
    const client::AttendRow row = {.sequence = &sequence, .position = position};
    client::AttendStep made;
    made.rows = {&row, 1};
    made.SetBuffers(buffers, store);
    const absl::StatusOr<client::AttendResult> result = client->Attend(made);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_TRUE(result->rows[0].status.ok()) << result->rows[0].status;
    EXPECT_TRUE(result->rows[0].out.empty());
    EXPECT_EQ(result->rows[0].lse.size(), layout().query_head_count);
    EXPECT_LT(NormalizedSquaredError(buffers->out(), Dense(position).out), kOutTolerance);
    EXPECT_EQ(k, std::vector<std::byte>(buffers->k().begin(), buffers->k().end()));
  };
  {
    client::StepBuffers shared = client->NewStepBuffers(Shape());
    client::StepBuffers own = client->NewStepBuffers(Shape());
    EXPECT_TRUE(shared.out().empty());
    for (uint32_t position = 20; position < 24; position += 2) {
      step(&shared, position, true);
      step(&own, position + 1, true);
      step(&shared, position, false);
      step(&own, position, false);
    }
    // Its slot is taken, so others take another way.
    EXPECT_EQ(*Attend(client.get(), sequence, 19), Transport::kStream);
    client::StepBuffers moved(std::move(shared));
    step(&moved, 24, true);
  }
  EXPECT_EQ(*Attend(client.get(), sequence, 19), Transport::kLane);
}

TEST_F(LaneClientTest, StepBuffersOutliveALaneAndAClient) {
  std::optional<client::StepBuffers> buffers;
  {
    const auto client = Connect(Options());
    buffers.emplace(client->NewStepBuffers(
        {.token_count = 1, .query_head_count = 4, .kv_head_count = 2, .head_dim = 64}));
    served_.reset();
  }
  std::fill(buffers->q().begin(), buffers->q().end(), std::byte{1});
  EXPECT_EQ(buffers->q().size(), 4U * 64U * sizeof(float));
  EXPECT_EQ(buffers->v().size(), 2U * 64U * 2U);
}

TEST_F(LaneClientTest, AServerThatGoesAndComesBackIsFoundAgain) {
  const TemporaryFolder folder;
  const auto serve = [&] {
    auto engine = std::make_unique<TestEngine>();
    Endpoint endpoint;
    endpoint.path = folder.path() + "/data";
    ServerOptions options;
    options.listen = {{.endpoint = endpoint}};
    auto server = NewServer(
        options, engine->get(),
        {.clock = SystemClock(), .random = SystemRandom(), .transport = SystemTransport()});
    EXPECT_TRUE(server.ok()) << server.status();
    return std::pair(std::move(engine), *std::move(server));
  };
  auto running = serve();
  client::ClientOptions options = Options();
  options.endpoint = "unix:" + folder.path() + "/data";
  const auto client = Connect(options);
  options.transport = Transport::kStream;
  const auto streaming = Connect(options);
  for (int life = 0; life < 2; ++life) {
    client::Sequence sequence = Create(client.get(), 20);
    // In its second life first by any way that works, as the others are broken.
    EXPECT_TRUE(
        Eventually([&] { return *Attend(client.get(), sequence, 19) == Transport::kLane; }));
    client::Sequence adopted = streaming->Adopt(sequence.id(), sequence.generation());
    EXPECT_TRUE(
        Eventually([&] { return *Attend(streaming.get(), adopted, 19) == Transport::kStream; }));
    adopted.Detach();
    if (life > 0) continue;
    // Dropping it would drop its namesake: ids of test engines repeat.
    sequence.Detach();
    running.second.reset();
    running.first.reset();
    running = serve();
  }
}

}  // namespace
}  // namespace kvservice::testing
