// Pauses between attempts and what errors tell, without a network.

#include "client/retry.h"

#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <optional>
#include <set>
#include <string>

#include "client/error.h"
#include "client/status.h"
#include "kvservice/v1/error_details.pb.h"

namespace kvservice::client {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kLong{1'000'000};

absl::Status Unavailable() { return absl::UnavailableError("broken"); }

// A status as a server sends it, with a retry delay.
absl::Status Refused(int64_t seconds, int32_t nanos) {
  v1::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(seconds);
  retry.mutable_retry_delay()->set_nanos(nanos);
  v1::Status rpc;
  google::protobuf::Any* const any = rpc.add_details();
  any->set_type_url("type.googleapis.com/google.rpc.RetryInfo");
  any->set_value(retry.SerializeAsString());
  return StatusFromWire(static_cast<int>(absl::StatusCode::kUnavailable), "refused",
                        rpc.SerializeAsString());
}

TEST(BackoffTest, PausesDoubleUpToTheirLimitWithJitter) {
  const RetryOptions options = {
      .attempts_max = 6, .backoff_first = milliseconds(100), .backoff_max = milliseconds(300)};
  std::set<int64_t> first_pauses;
  for (uint32_t seed = 1; seed <= 50; ++seed) {
    Backoff backoff(options, Repeat::kAlways, seed);
    for (const int64_t whole : {100, 200, 300, 300, 300}) {
      const std::optional<milliseconds> pause = backoff.Next(Unavailable(), kLong);
      ASSERT_TRUE(pause.has_value());
      EXPECT_GE(pause->count(), whole / 2);
      EXPECT_LE(pause->count(), whole);
      if (whole == 100) first_pauses.insert(pause->count());
    }
    EXPECT_FALSE(backoff.Next(Unavailable(), kLong).has_value());
  }
  EXPECT_GT(first_pauses.size(), 10U);
}

TEST(BackoffTest, HonoursTheServersDelay) {
  Backoff backoff({}, Repeat::kAlways, 1);
  EXPECT_EQ(backoff.Next(Refused(3, 500'000'000), kLong), milliseconds(3'500));
}

TEST(BackoffTest, NeverPausesBeyondTheDeadline) {
  Backoff backoff({}, Repeat::kAlways, 1);
  EXPECT_FALSE(backoff.Next(Refused(3, 0), milliseconds(3'000)).has_value());
  EXPECT_FALSE(backoff.Next(Unavailable(), milliseconds(0)).has_value());
}

TEST(BackoffTest, OnlyUnavailableIsRepeated) {
  for (int code = 1; code <= 16; ++code) {
    Backoff backoff({}, Repeat::kAlways, 1);
    const absl::Status status = MakeError(code, "failed", "ANY");
    EXPECT_EQ(backoff.Next(status, kLong).has_value(),
              status.code() == absl::StatusCode::kUnavailable)
        << status;
  }
}

TEST(BackoffTest, CallsWithEffectsAreRepeatedOnlyAfterARefusal) {
  Backoff backoff({}, Repeat::kIfRefused, 1);
  EXPECT_TRUE(backoff.Next(MakeError(14, "draining", "DRAINING"), kLong).has_value());
  EXPECT_FALSE(backoff.Next(Unavailable(), kLong).has_value());
}

TEST(StatusTest, TakesErrorsApart) {
  const absl::Status status =
      MakeError(11, "too far", "POSITION_GAP", "position", {{"current_length", "128"}});
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(ReasonOf(status), "POSITION_GAP");
  EXPECT_EQ(FieldOf(status), "position");
  EXPECT_EQ(MetadataOf(status).at("current_length"), "128");
  EXPECT_FALSE(RetryDelayOf(status).has_value());
}

TEST(StatusTest, ErrorsWithoutDetailsHaveNone) {
  for (const absl::Status& status : {absl::OkStatus(), Unavailable()}) {
    EXPECT_EQ(ReasonOf(status), "");
    EXPECT_EQ(FieldOf(status), "");
    EXPECT_TRUE(MetadataOf(status).empty());
    EXPECT_FALSE(RetryDelayOf(status).has_value());
  }
}

TEST(StatusTest, DetailsThatAreNoneAreIgnored) {
  const absl::Status status = StatusFromWire(3, "bad", std::string("\xff\x00garbage", 9));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReasonOf(status), "");
  EXPECT_EQ(StatusFromWire(99, "strange", "").code(), absl::StatusCode::kUnknown);
}

TEST(StatusTest, RetryDelaysAreClamped) {
  EXPECT_EQ(RetryDelayOf(Refused(-5, -5)), milliseconds(0));
  EXPECT_EQ(RetryDelayOf(Refused(std::numeric_limits<int64_t>::max(), 0)), std::chrono::hours(24));
}

}  // namespace
}  // namespace kvservice::client
