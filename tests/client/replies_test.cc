// Replies of Attend, which are read in two ways: as the messages that protobuf makes of them, and
// with their columns where they lie. Both must say the same of whatever a server may write.

#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "client/replies.h"
#include "client/reply_parts.h"
#include "client/status.h"
#include "tests/client/made_reply.h"

namespace kvservice::testing {
namespace {

using client::AttendResult;

absl::StatusOr<AttendResult> FromMessage(const std::string& message) {
  google::protobuf::Arena arena;
  absl::StatusOr<AttendResult> result =
      client::ResultFromMessage(MadeRequest(), message, {}, &arena);
  // Whether its memory was there before makes no difference.
  const absl::StatusOr<AttendResult> prepared = client::ResultFromMessage(
      MadeRequest(), message, {}, &arena, client::PrepareResult(MadeRequest(), true));
  EXPECT_EQ(TextOf(prepared), TextOf(result));
  return result;
}

std::string Expected(const std::string& message) {
  v1::AttendResponse response;
  if (response.ParseFromString(message)) {
    return TextOf(client::ResultFromProto(MadeRequest(), response));
  }
  return "does not parse";
}

// Whether it could be read as it lies.
bool Splits(const std::string& message) {
  google::protobuf::Arena arena;
  client::ReplyParts parts;
  return client::SplitReply(message, &arena, &parts);
}

void ExpectSame(const std::string& message) {
  const absl::StatusOr<AttendResult> result = FromMessage(message);
  const std::string expected = Expected(message);
  if (expected == "does not parse") {
    EXPECT_EQ(client::FieldOf(result.status()), "message") << result.status();
  } else {
    EXPECT_EQ(TextOf(result), expected);
  }
}

TEST(RepliesTest, EveryNumberArrives) {
  const v1::AttendResponse response = MadeResponse();
  const absl::StatusOr<AttendResult> result = FromMessage(response.SerializeAsString());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(Splits(response.SerializeAsString()));
  ASSERT_EQ(result->rows.size(), kMadeRows);
  for (int i = 0; i < 2; ++i) {
    const v1::Certificates& from = response.results(i).certificates();
    const client::AttendRowResult& row = result->rows[static_cast<size_t>(i)];
    ASSERT_EQ(row.certificates.size(), static_cast<size_t>(from.level_size()));
    for (int n = 0; n < from.level_size(); ++n) {
      const HeadCertificate& head = row.certificates[static_cast<size_t>(n)];
      EXPECT_EQ(static_cast<int>(head.level), from.level(n) - v1::LEVEL_NONE);
      EXPECT_EQ(static_cast<int>(head.action), from.action(n) - v1::ACTION_SELECTED);
      EXPECT_EQ(head.met, from.met(n));
      EXPECT_EQ(head.log_kept, static_cast<double>(row.lse[static_cast<size_t>(n)]));
      EXPECT_EQ(head.log_kept_lower.value, from.log_kept_lower(n));
      EXPECT_EQ(head.log_kept_upper.value, from.log_kept_upper(n));
      EXPECT_EQ(head.log_dropped_lower.value, from.log_dropped_lower(n));
      EXPECT_EQ(head.log_dropped_upper.value, from.log_dropped_upper(n));
      EXPECT_EQ(head.dropped_mass_lower.value, static_cast<double>(from.dropped_mass_lower(n)));
      EXPECT_EQ(head.dropped_mass_upper.value, static_cast<double>(from.dropped_mass_upper(n)));
      EXPECT_EQ(head.dropped_mass_estimate, from.dropped_mass_estimate(n));
      if (i == 0) continue;
      EXPECT_EQ(head.failure_probability, from.failure_probability(n));
      EXPECT_EQ(head.output_error_upper, static_cast<double>(from.output_error_upper(n)));
      EXPECT_EQ(head.value_norm_lower, static_cast<double>(from.value_norm_lower(n)));
      EXPECT_EQ(head.keys_sampled, from.keys_sampled(n));
      EXPECT_EQ(head.rows_sampled, from.rows_sampled(n));
    }
  }
  const HeadCertificate unknown;
  EXPECT_EQ(result->rows[0].certificates[0].output_error_upper, unknown.output_error_upper);
  EXPECT_EQ(result->rows[0].groups[0].key_norm_max, client::GroupReport().key_norm_max);
  EXPECT_EQ(result->rows[1].groups[1].rows_sampled, 3999999999U);
  EXPECT_EQ(result->rows[1].groups[1].tokens_scanned, 70001U);
  EXPECT_EQ(result->rows[1].groups[1].query_distance, 6.125F);
  EXPECT_EQ(result->rows[1].selected[1], (std::vector<uint32_t>{1, 101, 501}));
  EXPECT_EQ(result->rows[1].deferred[0].dropped_mass_upper, std::vector<float>(kMadeHeads, 0.25F));
  EXPECT_EQ(client::ReasonOf(result->rows[2].status), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(TextOf(result), TextOf(client::ResultFromProto(MadeRequest(), response)));
}

// Protobuf merges messages, and takes numbers that are not packed.
TEST(RepliesTest, OtherFormsOfAMessageAreTheSame) {
  const v1::AttendResponse response = MadeResponse();
  const std::string expected = TextOf(client::ResultFromProto(MadeRequest(), response));
  v1::AttendResponse without = response;
  v1::AttendRowResult first = response.results(0);
  // As the last number of the column, on its own: tag and value.
  const std::string level = {
      v1::Certificates::kLevelFieldNumber << 3,
      static_cast<char>(first.certificates().level(static_cast<int>(kMadeHeads) - 1))};
  first.mutable_certificates()->mutable_level()->RemoveLast();
  std::string row = first.SerializeAsString();
  row += static_cast<char>(v1::AttendRowResult::kCertificatesFieldNumber << 3 | 2);
  row += static_cast<char>(level.size());
  row += level;
  std::string message;
  for (int i = 0; i < response.results_size(); ++i) {
    const std::string bytes = i == 0 ? row : response.results(i).SerializeAsString();
    message += static_cast<char>(v1::AttendResponse::kResultsFieldNumber << 3 | 2);
    for (size_t size = bytes.size();; size >>= 7) {
      message += static_cast<char>(size < 0x80 ? size : (size & 0x7F) | 0x80);
      if (size < 0x80) break;
    }
    message += bytes;
  }
  without.clear_results();
  message += without.SerializeAsString();
  EXPECT_FALSE(Splits(message));
  EXPECT_EQ(TextOf(FromMessage(message)), expected);
}

TEST(RepliesTest, WhatIsUnknownIsPassedBy) {
  v1::AttendResponse response = MadeResponse();
  const std::string expected = TextOf(client::ResultFromProto(MadeRequest(), response));
  const auto add = [](google::protobuf::Message* message) {
    message->GetReflection()->MutableUnknownFields(message)->AddVarint(100, 7);
    message->GetReflection()->MutableUnknownFields(message)->AddLengthDelimited(101, "text");
    message->GetReflection()->MutableUnknownFields(message)->AddFixed32(102, 1);
    message->GetReflection()->MutableUnknownFields(message)->AddFixed64(103, 1);
  };
  add(&response);
  add(response.mutable_results(0));
  add(response.mutable_results(0)->mutable_groups());
  add(response.mutable_results(1)->mutable_certificates());
  EXPECT_TRUE(Splits(response.SerializeAsString()));
  EXPECT_EQ(TextOf(FromMessage(response.SerializeAsString())), expected);
}

// A message that was damaged, once or a few times: bytes changed, left out, put in, and cut off.
TEST(RepliesTest, DamagedMessagesAreReadTheSameInBothWays) {
  const google::protobuf::LogSilencer silence;
  const std::string sound = MadeResponse().SerializeAsString();
  std::mt19937 random(7);
  const auto below = [&random](size_t end) { return random() % end; };
  int accepted = 0;
  for (int i = 0; i < 30'000; ++i) {
    std::string message = sound;
    for (size_t edits = 1 + below(3); edits > 0 && !message.empty(); --edits) {
      const size_t at = below(message.size());
      switch (below(6)) {
        case 0:
          message.erase(at, 1 + below(8));
          break;
        case 1:
          message.insert(at, 1, static_cast<char>(random()));
          break;
        case 2:
          message[at] = static_cast<char>(message[at] ^ (1U << below(8)));
          break;
        case 3:
          if (below(20) == 0) message.resize(at);
          break;
        default:
          message[at] = static_cast<char>(random());
      }
    }
    ExpectSame(message);
    accepted += FromMessage(message).ok() ? 1 : 0;
    if (HasFailure()) return;
  }
  // Neither all nor nothing.
  EXPECT_GT(accepted, 1'000);
  EXPECT_LT(accepted, 29'000);
}

}  // namespace
}  // namespace kvservice::testing
