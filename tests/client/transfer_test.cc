// Sequences that go from server to server: through the client library between servers in this
// process, whose connection can be cut, and with kvctl between server programs.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <bit>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "tests/kvservice/words.h"
#include "tests/server/cut_proxy.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::FieldOf;
using client::ReasonOf;
using ::testing::HasSubstr;

constexpr uint32_t kLayers = 2;
constexpr uint32_t kLength = 450;
constexpr KvLayout kLayout = {
    .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
// Keys and values of a token in all layers.
constexpr uint64_t kTokenBytes = uint64_t{kLayers} * 2 * 2 * 64 * 2;

std::unique_ptr<Client> ConnectClient(const std::string& endpoint, bool repeats = true) {
  client::ClientOptions options;
  options.endpoint = endpoint;
  if (!repeats) options.retry.attempts_max = 1;
  auto connected = Client::Connect(options);
  EXPECT_TRUE(connected.ok()) << connected.status();
  return *std::move(connected);
}

client::TensorView View(const std::vector<std::byte>& bytes, uint32_t tokens, uint32_t heads,
                        client::DType dtype) {
  return {.dtype = dtype,
          .token_count = tokens,
          .head_count = heads,
          .head_dim = kLayout.head_dim,
          .bytes = bytes};
}

void Fill(const client::Sequence& sequence, uint32_t position, const Words& words) {
  client::AppendWriter writer = sequence.Append();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto k = PartBytes(kLayout, kLayout.dtype, Part::kKey, layer, words);
    const auto v = PartBytes(kLayout, kLayout.dtype, Part::kValue, layer, words);
    const auto count = static_cast<uint32_t>(words.size());
    ASSERT_TRUE(writer
                    .Write(layer, position, View(k, count, 2, client::DType::kBfloat16),
                           View(v, count, 2, client::DType::kBfloat16))
                    .ok());
  }
  const auto receipt = writer.Commit();
  ASSERT_TRUE(receipt.ok()) << receipt.status();
}

// Output and bounds of a certified step, as text.
std::string Answer(const client::Sequence& sequence, uint32_t word) {
  const auto q = PartBytes(kLayout, DType::kFloat32, Part::kQuery, 1, Words{word});
  client::Policy policy;
  policy.selector = client::Selector::kCertified;
  policy.guarantee = client::Guarantee::kDeterministic;
  policy.dense_below_tokens = 0;
  policy.layers.emplace();
  client::AttendQuery query;
  query.layer = 1;
  query.position = kLength - 1;
  query.policy = policy;
  query.q = View(q, 1, 4, client::DType::kFloat32);
  const auto row = sequence.Attend(query);
  EXPECT_TRUE(row.ok()) << row.status();
  std::string text;
  for (const float x : row->out) absl::StrAppend(&text, absl::Hex(std::bit_cast<uint32_t>(x)), " ");
  for (const auto& head : row->certificates) {
    absl::StrAppend(&text, head.dropped_mass_upper.value, " ", head.dropped_mass_lower.value, "\n");
  }
  return text;
}

class TransferTest : public ::testing::Test {
 protected:
  // The target first: its endpoint, or that of a wire in front of it, is what the source may reach.
  void Serve(ServedEngineOptions target = {}) {
    target_ = std::make_unique<ServedEngine>(std::move(target));
    there_ = ConnectClient(target_->server()->endpoints()[0].ToString());
    ServedEngineOptions source;
    Endpoint wire;
    wire.path = target_->folder() + "/wire";
    source.server.transfers.targets = {
        {.endpoint = target_->server()->endpoints()[0]},
        {.endpoint = wire},
        {.tenant = kOtherTenant, .endpoint = target_->server()->endpoints()[1]}};
    source.server.transfers.transfers_max = 1;
    source_ = std::make_unique<ServedEngine>(std::move(source));
    here_ = ConnectClient(source_->server()->endpoints()[0].ToString(), false);
  }
  std::string TargetPath() const { return target_->server()->endpoints()[0].path; }
  std::string Target() const { return target_->server()->endpoints()[0].ToString(); }
  std::string WirePath() const { return target_->folder() + "/wire"; }

  client::Sequence NewSequence() {
    auto made = here_->CreateSequence({.model = kModel});
    EXPECT_TRUE(made.ok()) << made.status();
    Fill(*made, 0, Counting(0, kLength));
    return *std::move(made);
  }
  size_t SequencesThere() const { return target_->engine()->Stats().sequences; }

  std::unique_ptr<ServedEngine> target_;
  std::unique_ptr<ServedEngine> source_;
  std::unique_ptr<Client> here_;
  std::unique_ptr<Client> there_;
};

TEST_F(TransferTest, TheOtherServerAnswersAlike) {
  Serve();
  const client::Sequence sequence = NewSequence();
  const auto sent = sequence.Transfer(Target());
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->sent_bytes, kLength * kTokenBytes);
  const client::Sequence arrived = there_->Adopt(sent->id, sent->generation);
  for (const uint32_t word : {3U, 449U, 77U}) {
    EXPECT_EQ(Answer(sequence, word), Answer(arrived, word));
  }
  // Both go on by themselves.
  Fill(arrived, kLength, {1, 2, 3});
  EXPECT_EQ(arrived.Describe()->length_tokens, kLength + 3);
  EXPECT_EQ(sequence.Describe()->length_tokens, kLength);
  // A repeat finds what came of it.
  const auto again = sequence.Transfer(Target());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->id, sent->id);
  EXPECT_EQ(again->sent_bytes, 0U);
  EXPECT_EQ(SequencesThere(), 1U);
}

TEST_F(TransferTest, AMoveLeavesNothingHereAndMayBeRepeated) {
  Serve();
  client::Sequence sequence = NewSequence();
  const std::string id = sequence.id();
  const uint64_t generation = sequence.generation();
  const std::string answer = Answer(sequence, 9);
  const auto moved = sequence.MoveTo(Target());
  ASSERT_TRUE(moved.ok()) << moved.status();
  EXPECT_TRUE(sequence.id().empty());
  EXPECT_EQ(source_->engine()->Stats().sequences, 0U);
  const client::Sequence arrived = there_->Adopt(moved->id, moved->generation);
  EXPECT_EQ(Answer(arrived, 9), answer);
  // Whoever did not hear the answer asks again.
  client::Sequence same = here_->Adopt(id, generation);
  const auto again = same.MoveTo(Target());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->id, moved->id);
  client::Sequence gone = here_->Adopt(id, generation);
  EXPECT_EQ(ReasonOf(gone.Transfer(Target()).status()), "SEQUENCE_NOT_FOUND");
  gone.Detach();
}

// A wire that breaks in the middle costs what was on it, and no more.
TEST_F(TransferTest, ABrokenTransferGoesOnWhereItStopped) {
  Serve();
  const client::Sequence sequence = NewSequence();
  const uint64_t all_bytes = kLength * kTokenBytes;
  {
    const CutProxy wire(WirePath(), TargetPath(), all_bytes * 3 / 4);
    const auto cut = sequence.Transfer("unix:" + WirePath());
    EXPECT_EQ(cut.status().code(), absl::StatusCode::kUnavailable) << cut.status();
    EXPECT_EQ(ReasonOf(cut.status()), "TRANSFER_TARGET_UNREACHABLE");
    EXPECT_EQ(FieldOf(cut.status()), "target_endpoint");
  }
  EXPECT_EQ(SequencesThere(), 0U);
  EXPECT_GT(target_->engine()->Stats().pool_bytes_used, 0U);
  const auto sent = sequence.Transfer(Target());
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_GT(sent->sent_bytes, 0U);
  EXPECT_LT(sent->sent_bytes, all_bytes);
  const client::Sequence arrived = there_->Adopt(sent->id, sent->generation);
  EXPECT_EQ(Answer(sequence, 5), Answer(arrived, 5));
}

TEST_F(TransferTest, ABrokenTransferThatNobodyRepeatsIsForgotten) {
  Serve();
  const client::Sequence sequence = NewSequence();
  {
    const CutProxy wire(WirePath(), TargetPath(), 100'000);
    EXPECT_FALSE(sequence.Transfer("unix:" + WirePath()).ok());
  }
  EXPECT_GT(target_->engine()->Stats().pool_bytes_used, 0U);
  target_->clock()->AdvanceMs(EngineOptions().receive_idle_ms);
  std::promise<void> swept;
  target_->engine()->List("", {}, 1, [&](const auto& /*list*/) { swept.set_value(); });
  swept.get_future().wait();
  EXPECT_EQ(target_->engine()->Stats().pool_bytes_used, 0U);
}

// The server is nobody's way to reach other sockets.
TEST_F(TransferTest, OnlyNamedTargetsAreReached) {
  Serve();
  const client::Sequence sequence = NewSequence();
  Endpoint trap;
  trap.path = target_->folder() + "/trap";
  const auto listener = SystemTransport()->Listen(trap);
  ASSERT_TRUE(listener.ok());
  for (const std::string& target :
       {trap.ToString(), std::string("localhost:1"), std::string("no endpoint"), std::string(),
        // Another tenant's.
        target_->server()->endpoints()[1].ToString()}) {
    const auto refused = sequence.Transfer(target);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kPermissionDenied) << target;
    EXPECT_EQ(ReasonOf(refused.status()), "TRANSFER_TARGET_NOT_ALLOWED");
    EXPECT_EQ(FieldOf(refused.status()), "target_endpoint");
  }
  EXPECT_FALSE((*listener)->Accept().ok()) << "somebody has connected";
  // A tenant's sequences come to that tenant.
  const auto theirs = ConnectClient(source_->server()->endpoints()[1].ToString());
  auto made = theirs->CreateSequence({.model = kModel});
  ASSERT_TRUE(made.ok());
  Fill(*made, 0, Counting(0, 70));
  const auto sent = made->Transfer(target_->server()->endpoints()[1].ToString());
  ASSERT_TRUE(sent.ok()) << sent.status();
  client::Sequence foreign = there_->Adopt(sent->id, sent->generation);
  EXPECT_EQ(ReasonOf(foreign.Describe().status()), "SEQUENCE_NOT_FOUND");
  foreign.Detach();
}

TEST_F(TransferTest, WhatTheTargetSaysIsToldWithItsReason) {
  ServedEngineOptions small;
  small.engine.pool_bytes = 4 * BlockBytes(SmallModel(kLayers));
  Serve(std::move(small));
  const client::Sequence sequence = NewSequence();
  const auto full = sequence.Transfer(Target());
  EXPECT_EQ(full.status().code(), absl::StatusCode::kResourceExhausted) << full.status();
  EXPECT_EQ(ReasonOf(full.status()), "POOL_FULL");
  EXPECT_EQ(FieldOf(full.status()), "target_endpoint");
  EXPECT_TRUE(client::RetryDelayOf(full.status()).has_value());
  EXPECT_EQ(target_->engine()->Stats().pool_bytes_used, 0U);
  EXPECT_EQ(SequencesThere(), 0U);
  // An unknown model.
  client::ModelDescription model;
  model.name = "only here";
  model.layer_count = 1;
  model.query_head_count = 2;
  model.kv_head_count = 2;
  model.head_dim = 64;
  model.scale = 0.125F;
  ASSERT_TRUE(here_->RegisterModel(model).ok());
  const auto other = here_->CreateSequence({.model = "only here"});
  ASSERT_TRUE(other.ok());
  const auto unknown = other->Transfer(Target());
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(unknown.status()), "MODEL_NOT_FOUND");
}

// Somebody who takes a connection and never answers holds no server up.
TEST_F(TransferTest, ADrainBreaksOffWhatItsGraceLeaves) {
  Serve();
  const client::Sequence sequence = NewSequence();
  Endpoint silent;
  silent.path = WirePath();
  const auto listener = SystemTransport()->Listen(silent);
  ASSERT_TRUE(listener.ok());
  auto stuck =
      std::async(std::launch::async, [&] { return sequence.Transfer(silent.ToString()).status(); });
  pollfd connected{.fd = (*listener)->poll_fd(), .events = POLLIN, .revents = 0};
  ASSERT_EQ(poll(&connected, 1, -1), 1);
  // There is one place, and it is taken.
  const auto busy = sequence.Transfer(Target());
  EXPECT_EQ(busy.status().code(), absl::StatusCode::kResourceExhausted) << busy.status();
  EXPECT_EQ(ReasonOf(busy.status()), "TRANSFERS_BUSY");
  EXPECT_TRUE(client::RetryDelayOf(busy.status()).has_value());
  source_->server()->Drain(1);
  EXPECT_EQ(ReasonOf(stuck.get()), "DRAINING");
}

TEST(TransferProgramTest, KvctlSendsAndMoves) {
  const TemporaryFolder folder;
  const std::string source = "unix:" + folder.path() + "/source";
  const std::string target = "unix:" + folder.path() + "/target";
  const auto start = [](const std::string& endpoint, std::vector<std::string> more) {
    std::vector<std::string> arguments = {"--listen",     endpoint, "--admin-listen", "none",
                                          "--pool-bytes", "16MiB",  "--threads",      "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    auto server = std::make_unique<Program>("kvservice", arguments);
    EXPECT_TRUE(server->WaitForLine("ready")) << server->errors();
    return server;
  };
  const auto receiver = start(target, {});
  const auto sender = start(source, {"--transfer-targets", target});
  client::ModelDescription model;
  model.name = "handed over";
  model.layer_count = kLayers;
  model.query_head_count = kLayout.query_head_count;
  model.kv_head_count = kLayout.kv_head_count;
  model.head_dim = kLayout.head_dim;
  model.scale = 0.125F;
  const auto here = ConnectClient(source);
  const auto there = ConnectClient(target);
  ASSERT_TRUE(here->RegisterModel(model).ok());
  ASSERT_TRUE(there->RegisterModel(model).ok());
  auto made = here->CreateSequence({.model = model.name});
  ASSERT_TRUE(made.ok());
  Fill(*made, 0, Counting(0, kLength));
  const std::string answer = Answer(*made, 8);
  const std::string id = absl::BytesToHexString(made->id());
  const auto kvctl = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--endpoint", source, "sequence", "transfer"});
    Program program("kvctl", arguments);
    const int status = program.Wait();
    return std::pair(status, program.output() + program.errors());
  };
  const auto [status, text] = kvctl({id, target, "--move"});
  EXPECT_EQ(status, 0) << text;
  EXPECT_THAT(text, HasSubstr("dropped here"));
  const size_t at = text.find("there it is ");
  ASSERT_NE(at, std::string::npos) << text;
  const std::string there_id = absl::HexStringToBytes(text.substr(at + 12, 32));
  EXPECT_EQ(Answer(there->Adopt(there_id, 1), 8), answer);
  EXPECT_EQ(kvctl({id, "unix:/elsewhere"}).first, 3) << "it is gone";
  made->Detach();
  auto kept = here->CreateSequence({.model = model.name});
  ASSERT_TRUE(kept.ok());
  const auto refused = kvctl({absl::BytesToHexString(kept->id()), "unix:/elsewhere"});
  EXPECT_EQ(refused.first, 6);
  EXPECT_THAT(refused.second, HasSubstr("TRANSFER_TARGET_NOT_ALLOWED"));
  EXPECT_EQ(kvctl({"12", target}).first, 2);
}

}  // namespace
}  // namespace kvservice::testing
