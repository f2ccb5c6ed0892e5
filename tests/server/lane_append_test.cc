// Appends through shared memory: applied like the messages of a stream, in the order that the
// client gives them, whatever else it writes there.

#include <grpcpp/channel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/server/lane.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/kvservice/engine_client.h"
#include "tests/server/raw_lane.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kSlots = 8;
constexpr wire::LaneShape kShape = {
    .slot_count = kSlots, .request_bytes = 65536, .reply_bytes = 4096};

class LaneAppendTest : public ::testing::Test {
 protected:
  LaneAppendTest()
      : served_(Options()),
        channel_(served_.Connect()),
        sequences_(v1::SequenceService::NewStub(channel_)),
        attention_(v1::AttentionService::NewStub(channel_)),
        handle_(NewSequence()) {}
  static ServedEngineOptions Options() {
    ServedEngineOptions options;
    options.device = *NewDevice("reference", {});
    options.server.lanes_max = 4;
    options.server.lane_bytes_max = size_t{1} << 20;
    return options;
  }

  v1::SequenceHandle NewSequence() const {
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), request, &created)), "OK");
    return created.sequence().handle();
  }
  const Endpoint& endpoint() const { return served_.server()->endpoints()[0]; }
  // Words position, position + 1, ... of a layer.
  v1::AppendRequest Tokens(uint32_t layer, uint32_t position, uint32_t count) const {
    return MakeAppend(served_.model(), handle_, layer, position, Counting(position, count));
  }
  uint32_t Length() const {
    v1::GetRequest request;
    *request.mutable_handle() = handle_;
    v1::GetResponse got;
    EXPECT_EQ(ErrorText(sequences_->Get(NewContext().get(), request, &got)), "OK");
    return got.sequence().length_max_tokens();
  }
  // The output for the word at `position`, through gRPC.
  std::string Read(const v1::SequenceHandle& handle, uint32_t position) const {
    v1::AttendResponse response;
    const v1::AttendRequest request = MakeAttend(served_.model(), handle, 0, position, {position});
    EXPECT_EQ(ErrorText(attention_->Attend(NewContext().get(), request, &response)), "OK");
    EXPECT_EQ(RowErrorText(response.results(0)), "OK");
    return response.out().data();
  }
  // A request of which the server does not know yet.
  void Put(const RawLane& lane, uint32_t slot, uint32_t order,
           const v1::AppendRequest& request) const {
    lane.PutMessage(slot, lane.Place(slot, request).SerializeAsString());
    wire::Store(&lane.head(slot)->request_method, wire::kLaneAppend);
    wire::Store(&lane.head(slot)->request_order, order);
  }

  ServedEngine served_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  v1::SequenceHandle handle_;
};

TEST_F(LaneAppendTest, StoresWhatAStreamWouldStore) {
  const RawLane lane(endpoint(), kShape);
  ASSERT_EQ(lane.Append(0, lane.Place(0, Tokens(0, 0, 70))), "OK");
  EXPECT_EQ(lane.AppendResponse(0).message_count(), 1U);
  EXPECT_EQ(lane.AppendResponse(0).duplicate_count(), 0U);
  EXPECT_FALSE(lane.AppendResponse(0).has_sequence());
  EXPECT_EQ(lane.Append(1, lane.Place(1, Tokens(0, 64, 26))), "OK") << "half of it is there";
  EXPECT_EQ(Length(), 90U);

  const v1::SequenceHandle streamed = NewSequence();
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto writer = sequences_->Append(context.get(), &response);
  EXPECT_TRUE(writer->Write(MakeAppend(served_.model(), streamed, 0, 0, Counting(0, 90))));
  writer->WritesDone();
  ASSERT_EQ(ErrorText(writer->Finish()), "OK");
  for (const uint32_t position : {0U, 63U, 64U, 89U}) {
    EXPECT_EQ(Read(handle_, position), Read(streamed, position)) << position;
  }
}

TEST_F(LaneAppendTest, RepeatingIsHarmlessAndErrorsChangeNothing) {
  const RawLane lane(endpoint(), kShape);
  ASSERT_EQ(lane.Append(0, lane.Place(0, Tokens(0, 0, 70))), "OK");
  ASSERT_EQ(lane.Append(0, lane.Place(0, Tokens(0, 10, 20))), "OK");
  EXPECT_EQ(lane.AppendResponse(0).duplicate_count(), 1U);
  EXPECT_EQ(lane.Append(0, lane.Place(0, Tokens(0, 71, 1))), "OUT_OF_RANGE POSITION_GAP position");
  v1::AppendRequest other = Tokens(0, 10, 20);
  other.set_position(11);
  EXPECT_EQ(lane.Append(0, lane.Place(0, other)), "FAILED_PRECONDITION APPEND_CONFLICT position");
  other = Tokens(0, 70, 1);
  other.mutable_handle()->set_generation(handle_.generation() + 1);
  EXPECT_EQ(lane.Append(0, lane.Place(0, other)),
            "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation");
  other = lane.Place(0, Tokens(0, 70, 1));
  other.mutable_v()->mutable_region()->set_offset_bytes(uint64_t{1} << 60);
  EXPECT_EQ(lane.Append(0, other),
            "INVALID_ARGUMENT TENSOR_REGION_OUT_OF_RANGE v.region.offset_bytes");
  other = Tokens(0, 70, 1);
  other.mutable_k()->mutable_data()->replace(0, 2, "\x80\x7f");
  EXPECT_EQ(lane.Append(0, lane.Place(0, other)), "INVALID_ARGUMENT TENSOR_NOT_FINITE k");
  EXPECT_EQ(Length(), 70U);
}

TEST_F(LaneAppendTest, MethodsThatAreNoneAreRefused) {
  const RawLane lane(endpoint(), kShape);
  wire::Store(&lane.head(0)->request_method, uint32_t{2});
  EXPECT_EQ(lane.Call(0, v1::AttendRequest()),
            "INVALID_ARGUMENT LANE_METHOD_UNKNOWN request_method");
  wire::Store(&lane.head(0)->request_method, wire::kLaneAppend);
  lane.PutMessage(0, "\xff");
  lane.Submit(0);
  ASSERT_TRUE(lane.Wait(0));
  EXPECT_EQ(lane.Answer(0), "INVALID_ARGUMENT MESSAGE_MALFORMED");
}

// Its clients know of no methods and leave zeros there.
TEST_F(LaneAppendTest, VersionOneIsServedToo) {
  const RawLane lane(endpoint(), kShape, 1);
  EXPECT_EQ(lane.Call(0, lane.Place(0, MakeAttend(served_.model(), handle_, 0, 0, {0}))), "OK");
  EXPECT_EQ(RowErrorText(lane.Response(0).results(0)), "OK");
  EXPECT_EQ(Length(), 1U);
}

// Slots are filled in any order, also while the server looks; the order that counts is the
// client's.
TEST_F(LaneAppendTest, TheOrderIsTheClients) {
  const RawLane lane(endpoint(), kShape);
  std::mt19937 random(3);
  uint32_t order = UINT32_MAX - 40;  // numbers come round
  uint32_t position = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<uint32_t> slots;
    for (uint32_t slot = 0; slot < kSlots; ++slot) slots.push_back(slot);
    std::shuffle(slots.begin(), slots.end(), random);
    slots.resize(1 + random() % kSlots);
    for (size_t i = 0; i < slots.size(); ++i) {
      Put(lane, slots[i], order++, Tokens(0, position + static_cast<uint32_t>(i), 1));
    }
    for (const uint32_t slot : slots) lane.Submit(slot);
    for (const uint32_t slot : slots) {
      ASSERT_TRUE(lane.Wait(slot));
      ASSERT_EQ(lane.Answer(slot), "OK") << "round " << round;
      ASSERT_EQ(lane.AppendResponse(slot).duplicate_count(), 0U);
    }
    position += static_cast<uint32_t>(slots.size());
  }
  EXPECT_EQ(Length(), position);
}

// Orders that make no sense, also while they change: every request is answered all the same, and
// nothing is stored that was not sent.
TEST_F(LaneAppendTest, OrdersThatAreNoneHarmNobody) {
  const RawLane lane(endpoint(), kShape);
  ASSERT_EQ(lane.Append(0, lane.Place(0, Tokens(0, 0, 64))), "OK");
  std::atomic<bool> stop{false};
  std::thread vandal([&] {
    std::mt19937 random(11);
    while (!stop) {
      wire::Store(&lane.head(random() % kSlots)->request_order, uint32_t(random()));
      wire::Store(&lane.head(random() % kSlots)->request_method, uint32_t(random() % 3));
    }
  });
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      Put(lane, slot, static_cast<uint32_t>(random()) << 30, Tokens(0, random() % 64, 1));
    }
    for (uint32_t slot = 0; slot < kSlots; ++slot) lane.Submit(slot);
    for (uint32_t slot = 0; slot < kSlots; ++slot) ASSERT_TRUE(lane.Wait(slot));
  }
  stop = true;
  vandal.join();
  EXPECT_EQ(Length(), 64U);
}

// Stops whoever asks on another thread than the owner's until it is let go.
class GateClock final : public FakeClock {
 public:
  ~GateClock() override { Open(); }
  uint64_t SteadyNowNs() const override {
    if (std::this_thread::get_id() != owner_) opened_.wait(false);
    return FakeClock::SteadyNowNs();
  }
  void Open() {
    opened_ = true;
    opened_.notify_all();
  }

 private:
  const std::thread::id owner_ = std::this_thread::get_id();
  std::atomic<bool> opened_{false};
};

class OpenGate final : public CallGate {
 public:
  Caller Identify(const grpc::ServerContext& /*context*/) override { return LocalCaller("nobody"); }
  absl::Status Allow(const MethodAccess& method, const Caller& caller) override {
    return CheckAccess(method, caller);
  }
  absl::Status Admit(const MethodAccess& method, const Caller& caller) override {
    return Allow(method, caller);
  }
  void Ended(const CallRecord& /*record*/) override {}
};

// The thread that has answered may be stopped right there. What the client then puts into the slot
// is taken before what it puts into others later.
TEST(LaneOrderTest, AnAnswerThatIsSeenHasFreedItsSlot) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  GateClock clock;
  OpenGate gate;
  InFlight in_flight{size_t{1} << 20};
  LivePolicies policies{PolicyRegistry()};
  const LaneHost host = {
      .service = {.calls = {.gate = &gate, .in_flight = &in_flight, .clock = &clock},
                  .engine = engine.get(),
                  .policies = &policies},
      .wake = [] {}};
  const uint64_t bytes = wire::LaneBytes(kShape).value();
  const FileDescriptor file = wire::NewSealedMemory(bytes);
  const wire::SharedMemory mine = wire::SharedMemory::Map(file.get(), bytes);
  const wire::LaneMemory memory(mine.bytes(), kShape);
  const auto lane =
      std::make_shared<Lane>(&host, kTenant, wire::SharedMemory::Map(file.get(), bytes), kShape);

  const auto put = [&](uint32_t slot, uint32_t order, uint32_t position) {
    v1::SequenceHandle to;
    to.set_id(handle.id.bytes.data(), handle.id.bytes.size());
    to.set_generation(handle.generation);
    v1::AppendRequest request = MakeAppend(SmallModel(2), to, 0, position, {position});
    uint64_t offset = memory.RequestOffset(slot);
    for (v1::Tensor* const tensor : {request.mutable_k(), request.mutable_v()}) {
      const std::string data = std::move(*tensor->mutable_data());
      tensor->clear_data();
      std::memcpy(memory.Range(offset, data.size()).data(), data.data(), data.size());
      tensor->mutable_region()->set_offset_bytes(offset);
      tensor->mutable_region()->set_length_bytes(data.size());
      offset += wire::kLanePageBytes;
    }
    const std::string message = request.SerializeAsString();
    std::memcpy(memory.Range(offset, message.size()).data(), message.data(), message.size());
    wire::SlotHead* const head = memory.slot(slot);
    wire::Store(&head->request_offset, offset);
    wire::Store(&head->request_bytes, static_cast<uint32_t>(message.size()));
    wire::Store(&head->request_method, wire::kLaneAppend);
    wire::Store(&head->request_order, order);
    wire::Store(&head->request_number, wire::Load(head->request_number) + 1);
  };
  const auto answered = [&](uint32_t slot, uint32_t number) {
    return Eventually([&, head = memory.slot(slot)] {
      lane->TakeRequests();
      return wire::Load(head->reply_number) == number;
    });
  };

  put(0, 1, 0);
  ASSERT_TRUE(answered(0, 1));
  put(0, 2, 1);
  put(1, 3, 2);
  lane->TakeRequests();
  clock.Open();
  ASSERT_TRUE(answered(0, 2));
  ASSERT_TRUE(answered(1, 1));
  for (const uint32_t slot : {0U, 1U}) {
    const wire::SlotHead& head = *memory.slot(slot);
    const absl::Span<const std::byte> reply = memory.Range(head.reply_offset, head.reply_bytes);
    EXPECT_EQ(head.reply_code, 0U)
        << std::string(reinterpret_cast<const char*>(reply.data()), reply.size());
  }
  EXPECT_EQ(engine.Get(handle)->length_max, 3U);
}

}  // namespace
}  // namespace kvservice::testing
