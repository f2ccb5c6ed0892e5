// What the client makes of errors and of replies that do not fit, which no real server sends on
// demand.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "client/client.h"
#include "tests/client/scripted_server.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::ClientOptions;
using client::ReasonOf;
using std::chrono::milliseconds;

constexpr int kUnavailable = 14;
constexpr int kResourceExhausted = 8;
constexpr int kNotFound = 5;
constexpr uint32_t kHeads = 2;
constexpr uint32_t kHeadDim = 64;

class ScriptedServerTest : public ::testing::Test {
 protected:
  ScriptedServerTest() : server_(std::make_unique<ScriptedServer>(endpoint())) {
    ClientOptions options;
    options.endpoint = endpoint();
    options.deadlines.data = std::chrono::minutes(1);
    options.deadlines.admin = std::chrono::minutes(1);
    options.retry = {
        .attempts_max = 4, .backoff_first = milliseconds(1), .backoff_max = milliseconds(2)};
    absl::StatusOr<std::unique_ptr<Client>> connected = Client::Connect(options);
    EXPECT_TRUE(connected.ok()) << connected.status();
    client_ = *std::move(connected);
  }

  std::string endpoint() const { return "unix:" + folder_.path() + "/scripted"; }

  absl::Status Register() { return client_->RegisterModel({}).status(); }

  // One row of one query.
  absl::Status Attend() {
    absl::StatusOr<client::Sequence> sequence = client_->CreateSequence({.model = "any"});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    const std::vector<float> q(kHeads * kHeadDim);
    client::AttendQuery query;
    query.position = 9;
    query.q = client::Float32View(q, 1, kHeads, kHeadDim);
    absl::Status status = sequence->Attend(query).status();
    sequence->Detach();
    return status;
  }

  TemporaryFolder folder_;
  std::unique_ptr<ScriptedServer> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(ScriptedServerTest, RepeatsUnavailableUntilItWorks) {
  server_->FailNext({{kUnavailable, "DRAINING"}, {kUnavailable, ""}});
  EXPECT_TRUE(Register().ok());
  EXPECT_EQ(server_->call_count(), 3U);
}

TEST_F(ScriptedServerTest, GivesUpAfterTheLastAttempt) {
  server_->FailNext(std::vector<ScriptedError>(10, {kUnavailable, "DRAINING"}));
  const absl::Status status = Register();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(status), "DRAINING");
  EXPECT_EQ(server_->call_count(), 4U);
}

TEST_F(ScriptedServerTest, RepeatsNothingElse) {
  server_->FailNext({{kResourceExhausted, "OVERLOADED", 50}});
  const absl::Status status = Register();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(client::RetryDelayOf(status), milliseconds(50));
  EXPECT_EQ(server_->call_count(), 1U);
}

TEST_F(ScriptedServerTest, RepeatedCreatesCarryOneRequestId) {
  server_->FailNext({{kUnavailable, ""}, {kUnavailable, ""}});
  absl::StatusOr<client::Sequence> first = client_->CreateSequence({.model = "any"});
  ASSERT_TRUE(first.ok()) << first.status();
  absl::StatusOr<client::Sequence> second = client_->CreateSequence({.model = "any"});
  ASSERT_TRUE(second.ok()) << second.status();
  const std::vector<std::string> ids = server_->request_ids();
  ASSERT_EQ(ids.size(), 4U);
  EXPECT_EQ(ids[0], ids[1]);
  EXPECT_EQ(ids[0], ids[2]);
  EXPECT_NE(ids[0], ids[3]);
  first->Detach();
  second->Detach();
}

TEST_F(ScriptedServerTest, ForkIsRepeatedOnlyWhenTheServiceRefusedIt) {
  absl::StatusOr<client::Sequence> sequence = client_->CreateSequence({.model = "any"});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  server_->FailNext({{kUnavailable, "DRAINING"}});
  absl::StatusOr<client::Sequence> child = sequence->Fork();
  ASSERT_TRUE(child.ok()) << child.status();
  child->Detach();
  EXPECT_EQ(server_->call_count(), 3U);
  server_->FailNext({{kUnavailable, ""}});
  EXPECT_EQ(sequence->Fork().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(server_->call_count(), 4U);
  sequence->Detach();
}

TEST_F(ScriptedServerTest, AClosedSequenceThatIsGoneAfterALostAttemptWasClosed) {
  const auto close_after = [&](std::vector<ScriptedError> errors) {
    absl::StatusOr<client::Sequence> sequence = client_->CreateSequence({.model = "any"});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    server_->FailNext(std::move(errors));
    return sequence->Close().code();
  };
  EXPECT_EQ(close_after({{kUnavailable, ""}, {kNotFound, "SEQUENCE_NOT_FOUND"}}),
            absl::StatusCode::kOk);
  EXPECT_EQ(close_after({{kNotFound, "SEQUENCE_NOT_FOUND"}}), absl::StatusCode::kNotFound);
}

TEST_F(ScriptedServerTest, FindsARestartedServer) {
  EXPECT_TRUE(Register().ok());
  server_.reset();
  server_ = std::make_unique<ScriptedServer>(endpoint());
  EXPECT_TRUE(Register().ok());
}

struct MalformedReply {
  const char* field;
  std::function<void(v1::AttendResponse*)> edit;
};

std::vector<MalformedReply> MalformedReplies() {
  const auto row = [](v1::AttendResponse* reply) { return reply->mutable_results(0); };
  const auto certificates = [row](v1::AttendResponse* reply) {
    return row(reply)->mutable_certificates();
  };
  return {
      {"step_id", [](v1::AttendResponse* reply) { reply->set_step_id(reply->step_id() + 1); }},
      {"results", [](v1::AttendResponse* reply) { reply->clear_results(); }},
      {"results", [](v1::AttendResponse* reply) { reply->add_results(); }},
      {"out", [](v1::AttendResponse* reply) { reply->mutable_out()->mutable_data()->pop_back(); }},
      {"out", [](v1::AttendResponse* reply) { reply->mutable_out()->set_shape(0, 2); }},
      {"out",
       [](v1::AttendResponse* reply) { reply->mutable_out()->set_dtype(v1::DATA_TYPE_FLOAT16); }},
      {"lse", [](v1::AttendResponse* reply) { reply->clear_lse(); }},
      {"results[0].attended_tokens",
       [row](v1::AttendResponse* reply) { row(reply)->set_attended_tokens(11); }},
      {"results[0].generation",
       [row](v1::AttendResponse* reply) { row(reply)->set_generation(2); }},
      {"results[0].selector", [row](v1::AttendResponse* reply) { row(reply)->clear_selector(); }},
      {"results[0].groups", [row](v1::AttendResponse* reply) { row(reply)->clear_groups(); }},
      {"results[0].selected", [row](v1::AttendResponse* reply) { row(reply)->add_selected(); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) { certificates(reply)->mutable_met()->RemoveLast(); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) {
         certificates(reply)->set_level(1, v1::LEVEL_UNSPECIFIED);
       }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) { certificates(reply)->set_dropped_mass_upper(1, 1.5F); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) { certificates(reply)->set_dropped_mass_lower(1, 0.5F); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) { certificates(reply)->add_output_error_upper(0.5F); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) { certificates(reply)->add_keys_sampled(1); }},
      {"results[0].certificates",
       [=](v1::AttendResponse* reply) {
         certificates(reply)->set_dropped_mass_upper(0, std::numeric_limits<float>::quiet_NaN());
       }},
  };
}

TEST_F(ScriptedServerTest, RepliesThatDoNotFitAreNotBelieved) {
  ASSERT_TRUE(Attend().ok()) << Attend();
  for (const MalformedReply& malformed : MalformedReplies()) {
    server_->EditAttend(malformed.edit);
    const absl::Status status = Attend();
    EXPECT_EQ(ReasonOf(status), client::kReplyMalformed) << malformed.field;
    EXPECT_EQ(client::FieldOf(status), malformed.field) << status;
  }
}

}  // namespace
}  // namespace kvservice::testing
