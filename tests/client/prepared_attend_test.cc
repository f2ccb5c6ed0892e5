// Calls that somebody else rings: a thread here, in the place of a GPU's stream.

#include <gtest/gtest.h>

#include <atomic>
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
#include "tests/client/made_reply.h"
#include "wire/lane_layout.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::PreparedAttend;
using client::StepBuffers;
using client::Transport;

constexpr double kOutTolerance = 1e-10;
constexpr uint32_t kLength = 20;

void Store(const client::Doorbell& doorbell) {
  std::atomic_ref<uint32_t>(*doorbell.request).store(doorbell.value, std::memory_order_release);
}

// What a stream does: rings and waits. False after half a minute.
bool Pass(const client::Doorbell& doorbell) {
  Store(doorbell);
  const std::atomic_ref<uint32_t> reply(const_cast<uint32_t&>(*doorbell.reply));
  return Eventually([&] {
    return static_cast<int32_t>(reply.load(std::memory_order_acquire) - doorbell.value) >= 0;
  });
}

// All of it but what differs from call to call.
std::string TextOfAnswer(absl::StatusOr<client::AttendResult> result) {
  if (result.ok()) result->call_number = result->queue_ns = result->service_ns = 0;
  return TextOf(result);
}

// "CODE REASON field".
std::string ErrorText(const absl::Status& status) {
  return absl::StatusCodeToString(status.code()) + " " + client::ReasonOf(status) + " " +
         client::FieldOf(status);
}

class PreparedAttendTest : public LaneCase {
 protected:
  // A step of one row whose tensors are the buffers'.
  struct Asked {
    client::AttendRow row;
    client::AttendStep step;
  };
  static std::unique_ptr<Asked> Ask(const client::Sequence& sequence, uint32_t position,
                                    StepBuffers* buffers) {
    auto asked = std::make_unique<Asked>();
    asked->row = {.sequence = &sequence, .position = position};
    asked->step.rows = {&asked->row, 1};
    asked->step.SetBuffers(buffers, true);
    return asked;
  }
  // Nothing of the step but its buffers is needed behind it.
  static absl::StatusOr<PreparedAttend> Prepare(Client* from, const client::Sequence& sequence,
                                                uint32_t position, StepBuffers* buffers) {
    return from->PrepareAttend(Ask(sequence, position, buffers)->step);
  }
  // A client whose calls have little time, and one behind it in the server's rounds: when that has
  // an answer the server has seen whatever was rung before.
  std::pair<std::unique_ptr<Client>, std::unique_ptr<Client>> ConnectHastyAndOther() const {
    client::ClientOptions options = Options();
    options.deadlines.data = std::chrono::milliseconds(50);
    std::unique_ptr<Client> hasty = Connect(options);
    return {std::move(hasty), Connect(Options())};
  }
  static uint32_t Length(const client::Sequence& sequence) {
    return sequence.Describe()->length_max_tokens;
  }
  // For a server that can only be woken, as it does not look before it sleeps.
  static bool FallsAsleep(const StepBuffers& buffers) {
    const auto& head = *reinterpret_cast<const wire::LaneHead*>(buffers.shared_memory().data());
    return Eventually([&] { return wire::Load(head.server_asleep) != 0; });
  }
};

TEST_F(PreparedAttendTest, AnswersAreThoseOfAttend) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), 200);
  StepBuffers prepared = client->NewStepBuffers(Shape());
  StepBuffers usual = client->NewStepBuffers(Shape());
  for (uint32_t position = 200; position < 204; ++position) {
    const auto asked = Ask(sequence, position, &prepared);
    asked->step.return_selected = true;
    asked->step.policy = {.selector = client::Selector::kCertified,
                          .max_dropped_mass = 0.05F,
                          .guarantee = client::Guarantee::kDeterministic};
    absl::StatusOr<PreparedAttend> call = client->PrepareAttend(asked->step);
    ASSERT_TRUE(call.ok()) << call.status();
    std::vector<float> out;
    std::vector<float> lse;
    std::thread stream([&, doorbell = call->doorbell(), at = call->out(), lse_at = call->lse()] {
      Fill(position, &prepared);
      EXPECT_TRUE(Pass(doorbell));
      out.assign(at.begin(), at.end());
      lse.assign(lse_at.begin(), lse_at.end());
    });
    absl::StatusOr<client::AttendResult> result = call->Finish();
    stream.join();
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->transport, Transport::kLane);
    Fill(position, &usual);
    asked->step.SetBuffers(&usual, true);
    EXPECT_EQ(TextOfAnswer(*result), TextOfAnswer(client->Attend(asked->step)));
    EXPECT_EQ(absl::MakeConstSpan(out), usual.out());
    EXPECT_EQ(absl::MakeConstSpan(out), prepared.out());
    EXPECT_EQ(lse, result->rows[0].lse);
  }
}

// Of one stream, each of which needs what the one before has stored.
TEST_F(PreparedAttendTest, SeveralAreOnTheirWay) {
  constexpr uint32_t kCalls = 4;
  client::ClientOptions options = Options();
  options.lane.calls_max = kCalls;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), kLength);
  std::vector<StepBuffers> buffers;
  for (uint32_t i = 0; i < kCalls; ++i) buffers.push_back(client->NewStepBuffers(Shape()));
  for (uint32_t begin = kLength; begin < kLength + 3 * kCalls; begin += kCalls) {
    std::vector<PreparedAttend> calls;
    std::vector<client::Doorbell> doorbells;
    for (uint32_t i = 0; i < kCalls; ++i) {
      calls.push_back(*Prepare(client.get(), sequence, begin + i, &buffers[i]));
      doorbells.push_back(calls[i].doorbell());
    }
    std::thread stream([&] {
      for (uint32_t i = 0; i < kCalls; ++i) {
        Fill(begin + i, &buffers[i]);
        EXPECT_TRUE(Pass(doorbells[i]));
      }
    });
    for (uint32_t i = 0; i < kCalls; ++i) {
      const absl::Span<const float> place = calls[i].out();
      const absl::StatusOr<client::AttendResult> result = calls[i].Finish();
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(ErrorText(result->rows[0].status), "OK  ");
      EXPECT_EQ(place.data(), buffers[i].out().data());
      EXPECT_LT(NormalizedSquaredError(place, Dense(begin + i).out), kOutTolerance);
    }
    stream.join();
  }
}

TEST_F(PreparedAttendTest, WorkersWithoutAGpuRingThemselves) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), kLength);
  StepBuffers buffers = client->NewStepBuffers(Shape());
  PreparedAttend call = *Prepare(client.get(), sequence, kLength, &buffers);
  Fill(kLength, &buffers);
  ASSERT_TRUE(FallsAsleep(buffers));
  call.Ring();
  // Nobody but Ring has told the server.
  EXPECT_TRUE(Eventually([&] { return Length(sequence) == kLength + 1; }));
  EXPECT_EQ(ErrorText(call.Finish().status()), "OK  ");
  EXPECT_LT(NormalizedSquaredError(buffers.out(), Dense(kLength).out), kOutTolerance);
}

TEST_F(PreparedAttendTest, AServerThatSleepsIsWoken) {
  client::ClientOptions options = Options();
  options.deadlines.data = std::chrono::seconds(5);
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), kLength);
  StepBuffers buffers = client->NewStepBuffers(Shape());
  Fill(kLength, &buffers);
  PreparedAttend call = *Prepare(client.get(), sequence, kLength, &buffers);
  ASSERT_TRUE(FallsAsleep(buffers));
  Store(call.doorbell());
  EXPECT_EQ(ErrorText(call.Finish().status()), "OK  ");
}

TEST_F(PreparedAttendTest, CallsThatAreNotRungAreTakenBack) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), kLength);
  StepBuffers buffers = client->NewStepBuffers(Shape());
  Fill(kLength, &buffers);
  std::optional<PreparedAttend> call(*Prepare(client.get(), sequence, kLength, &buffers));
  // It has the slot until then.
  EXPECT_EQ(ErrorText(Prepare(client.get(), sequence, kLength, &buffers).status()),
            "FAILED_PRECONDITION LANE_UNAVAILABLE ");
  const client::Doorbell taken_back = call->doorbell();
  call.reset();
  EXPECT_EQ(Length(sequence), kLength);
  const auto asked = Ask(sequence, kLength, &buffers);
  EXPECT_EQ(client->Attend(asked->step)->transport, Transport::kLane);
  // A number is somebody's once.
  EXPECT_NE(wire::Load(*taken_back.reply), taken_back.value);
  call.emplace(*Prepare(client.get(), sequence, kLength + 1, &buffers));
  Fill(kLength + 1, &buffers);
  call->Ring();
  EXPECT_EQ(ErrorText(call->Finish().status()), "OK  ");
  EXPECT_EQ(Length(sequence), kLength + 2);
}

TEST_F(PreparedAttendTest, CallsThatAreRungMayBeGivenUp) {
  const auto client = Connect(Options());
  const client::Sequence sequence = Create(client.get(), kLength);
  StepBuffers buffers = client->NewStepBuffers(Shape());
  Fill(kLength, &buffers);
  ASSERT_TRUE(FallsAsleep(buffers));
  brake_.Set(true);
  client::Doorbell doorbell;
  {
    const PreparedAttend call = *Prepare(client.get(), sequence, kLength, &buffers);
    doorbell = call.doorbell();
    Store(doorbell);
  }
  // Whoever gives it up wakes the server, too.
  ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
  EXPECT_EQ(ErrorText(Prepare(client.get(), sequence, kLength + 1, &buffers).status()),
            "FAILED_PRECONDITION LANE_UNAVAILABLE ");
  brake_.Set(false);
  EXPECT_TRUE(Eventually([&] { return wire::Load(*doorbell.reply) == doorbell.value; }));
  EXPECT_TRUE(Prepare(client.get(), sequence, kLength + 1, &buffers).ok());
  EXPECT_EQ(Length(sequence), kLength + 1);
}

// Of calls that were rung before it was gone, after, and by a stream whose call nobody finishes.
TEST_F(PreparedAttendTest, AServerThatIsGoneLetsStreamsGo) {
  const auto client = Connect(Options());
  client::Sequence sequence = Create(client.get(), kLength);
  std::vector<StepBuffers> buffers;
  std::vector<std::optional<PreparedAttend>> calls;
  std::vector<client::Doorbell> doorbells;
  for (uint32_t i = 0; i < 4; ++i) {
    buffers.push_back(client->NewStepBuffers(Shape()));
    calls.emplace_back(*Prepare(client.get(), sequence, kLength + i, &buffers[i]));
    doorbells.push_back(calls[i]->doorbell());
  }
  served_.reset();
  Store(doorbells[0]);
  calls[0].reset();
  std::thread stream([&] {
    for (const client::Doorbell& doorbell : doorbells) EXPECT_TRUE(Pass(doorbell));
  });
  EXPECT_EQ(ErrorText(calls[1]->Finish().status()), "UNAVAILABLE LANE_BROKEN ");
  stream.join();
  EXPECT_EQ(ErrorText(calls[2]->Finish().status()), "UNAVAILABLE LANE_BROKEN ");
  EXPECT_EQ(ErrorText(Prepare(client.get(), sequence, kLength, &buffers[1]).status()),
            "FAILED_PRECONDITION LANE_UNAVAILABLE ");
  sequence.Detach();
}

// The stream goes on without an answer, and nothing of what it makes of that is stored.
TEST_F(PreparedAttendTest, TimeThatIsOverLetsStreamsGo) {
  const auto [hasty, client] = ConnectHastyAndOther();
  const client::Sequence sequence = Create(client.get(), kLength);
  const client::Sequence adopted = hasty->Adopt(sequence.id(), sequence.generation());
  StepBuffers first_buffers = hasty->NewStepBuffers(Shape());
  StepBuffers second_buffers = hasty->NewStepBuffers(Shape());
  PreparedAttend first = *Prepare(hasty.get(), adopted, kLength, &first_buffers);
  PreparedAttend second = *Prepare(hasty.get(), adopted, kLength + 1, &second_buffers);
  brake_.Set(true);
  std::thread stream([&, doorbells = std::vector{first.doorbell(), second.doorbell()}] {
    Fill(kLength, &first_buffers);
    EXPECT_TRUE(Pass(doorbells[0]));
    Fill(kLength + 1, &second_buffers);
    EXPECT_TRUE(Pass(doorbells[1]));
  });
  EXPECT_EQ(ErrorText(first.Finish().status()), "DEADLINE_EXCEEDED LANE_BROKEN ");
  stream.join();
  EXPECT_EQ(ErrorText(second.Finish().status()), "UNAVAILABLE LANE_BROKEN ");
  brake_.Set(false);
  const auto asked = Ask(sequence, kLength, &first_buffers);
  EXPECT_EQ(client->Attend(asked->step)->transport, Transport::kLane);
  EXPECT_EQ(Length(sequence), kLength + 1);
}

// When nobody rings in time, whoever rings later stores nothing.
TEST_F(PreparedAttendTest, StreamsThatComeTooLateDoNotWait) {
  const auto [hasty, client] = ConnectHastyAndOther();
  const client::Sequence sequence = Create(client.get(), kLength);
  const client::Sequence adopted = hasty->Adopt(sequence.id(), sequence.generation());
  StepBuffers buffers = hasty->NewStepBuffers(Shape());
  Fill(kLength, &buffers);
  PreparedAttend call = *Prepare(hasty.get(), adopted, kLength, &buffers);
  const client::Doorbell doorbell = call.doorbell();
  EXPECT_EQ(ErrorText(call.Finish().status()), "DEADLINE_EXCEEDED LANE_BROKEN ");
  EXPECT_TRUE(Pass(doorbell));
  const auto asked = Ask(sequence, 0, &buffers);
  EXPECT_EQ(client->Attend(asked->step)->transport, Transport::kLane);
  EXPECT_EQ(Length(sequence), kLength);
}

TEST_F(PreparedAttendTest, WrongInputChangesNothing) {
  client::ClientOptions options = Options();
  options.lane.calls_max = 2;
  options.lane.call_bytes_max = 4096;
  const auto client = Connect(options);
  const client::Sequence sequence = Create(client.get(), kLength);
  StepBuffers buffers = client->NewStepBuffers(Shape());
  StepBuffers others = client->NewStepBuffers(Shape());
  StepBuffers own = client->NewStepBuffers(Shape());
  EXPECT_FALSE(buffers.shared_memory().empty());
  EXPECT_EQ(buffers.shared_memory().data(), others.shared_memory().data());
  EXPECT_TRUE(own.shared_memory().empty());
  const auto error = [&](auto spoil) {
    const auto asked = Ask(sequence, kLength, &buffers);
    spoil(asked.get());
    return ErrorText(client->PrepareAttend(asked->step).status());
  };
  const client::Sequence closed = client->Adopt("", 0);
  const std::vector<uint32_t> positions(2000, 300);
  EXPECT_EQ(error([](Asked* asked) { asked->step.buffers = nullptr; }),
            "INVALID_ARGUMENT REQUEST_INVALID buffers");
  EXPECT_EQ(error([](Asked* asked) { asked->step.rows = {}; }),
            "INVALID_ARGUMENT REQUEST_INVALID rows");
  EXPECT_EQ(error([&](Asked* asked) { asked->row.sequence = &closed; }),
            "INVALID_ARGUMENT REQUEST_INVALID rows[0].sequence");
  EXPECT_EQ(error([](Asked* asked) { asked->step.v = {}; }), "INVALID_ARGUMENT REQUEST_INVALID v");
  EXPECT_EQ(error([&](Asked* asked) { asked->step.q = others.q_view(); }),
            "INVALID_ARGUMENT REQUEST_INVALID q");
  EXPECT_EQ(error([&](Asked* asked) { asked->step.k = others.k_view(); }),
            "INVALID_ARGUMENT REQUEST_INVALID k");
  EXPECT_EQ(error([&](Asked* asked) { asked->step.v = others.v_view(); }),
            "INVALID_ARGUMENT REQUEST_INVALID v");
  EXPECT_EQ(error([&](Asked* asked) { asked->step.SetBuffers(&own, true); }),
            "FAILED_PRECONDITION LANE_UNAVAILABLE ");
  EXPECT_EQ(error([&](Asked* asked) { asked->row.given.positions = positions; }),
            "FAILED_PRECONDITION LANE_UNAVAILABLE ");
  const auto stranger = Connect(Options());
  const client::Sequence foreign = Create(stranger.get(), 1);
  EXPECT_EQ(error([&](Asked* asked) { asked->row.sequence = &foreign; }),
            "INVALID_ARGUMENT REQUEST_INVALID rows[0].sequence");
  // What only the server knows Finish says, of the call or of a row.
  Fill(kLength, &buffers);
  const auto asked = Ask(sequence, kLength, &buffers);
  asked->step.layer = 7;
  PreparedAttend call = *client->PrepareAttend(asked->step);
  call.Ring();
  EXPECT_EQ(call.Finish().status().code(), client->Attend(asked->step).status().code());
  PreparedAttend gap = *Prepare(client.get(), sequence, kLength + 1, &buffers);
  gap.Ring();
  EXPECT_EQ(ErrorText(gap.Finish()->rows[0].status), "OUT_OF_RANGE POSITION_GAP rows[0].position");
  EXPECT_EQ(Length(sequence), kLength);
  EXPECT_EQ(ErrorText(client->Attend(Ask(sequence, kLength, &buffers)->step).status()), "OK  ");
}

}  // namespace
}  // namespace kvservice::testing
