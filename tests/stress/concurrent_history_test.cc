// Histories that are linearizable and others that are not, and the short form of the campaign;
// kvstress runs the long one.

#include "tests/stress/concurrent_history.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/stress/history.h"

namespace kvservice::testing {
namespace {

using ::testing::ElementsAre;
using Kind = Operation::Kind;

Operation Appended(uint64_t called, uint64_t returned, const Words& words, uint32_t length) {
  return {.kind = Kind::kAppend,
          .called = called,
          .returned = returned,
          .generation = 1,
          .position = length - static_cast<uint32_t>(words.size()),
          .words = words,
          .reason = "",
          .generation_after = 1,
          .length_after = length};
}

Operation Got(uint64_t called, uint64_t returned, uint32_t length) {
  return {.kind = Kind::kGet,
          .called = called,
          .returned = returned,
          .words = {},
          .reason = "",
          .generation_after = 1,
          .length_after = length};
}

TEST(HistoryTest, CallsAtTheSameTimeMayBeInAnyOrder) {
  EXPECT_TRUE(IsLinearizable({}, 1));
  EXPECT_TRUE(IsLinearizable({Appended(1, 4, {5, 6}, 2), Got(2, 3, 0)}, 1));
  EXPECT_TRUE(IsLinearizable({Appended(1, 4, {5, 6}, 2), Got(2, 3, 2)}, 1));
  EXPECT_FALSE(IsLinearizable({Appended(1, 4, {5, 6}, 2), Got(2, 3, 1)}, 1)) << "half of it";
}

TEST(HistoryTest, WhatIsOverWasBefore) {
  EXPECT_TRUE(IsLinearizable({Appended(1, 2, {5}, 1), Got(3, 4, 1)}, 1));
  EXPECT_FALSE(IsLinearizable({Appended(1, 2, {5}, 1), Got(3, 4, 0)}, 1)) << "an old answer";
  // Both saw it, then one did not.
  EXPECT_FALSE(IsLinearizable({Appended(1, 9, {5}, 1), Got(2, 3, 1), Got(4, 5, 0)}, 1));
}

TEST(HistoryTest, AnswersAreThoseOfASequence) {
  Operation again = Appended(3, 4, {5}, 1);
  EXPECT_FALSE(IsLinearizable({Appended(1, 2, {5}, 1), again}, 1)) << "not told as a duplicate";
  again.is_duplicate = true;
  EXPECT_TRUE(IsLinearizable({Appended(1, 2, {5}, 1), again}, 1));
  Operation other = Appended(3, 4, {6}, 1);
  EXPECT_FALSE(IsLinearizable({Appended(1, 2, {5}, 1), other}, 1)) << "two words at one place";
  other.reason = "APPEND_CONFLICT";
  EXPECT_TRUE(IsLinearizable({Appended(1, 2, {5}, 1), other}, 1));
  other.length_after = 2;
  EXPECT_FALSE(IsLinearizable({Appended(1, 2, {5}, 1), other}, 1)) << "tells another length";
}

TEST(ConcurrentHistoryTest, WhatThreadsSeeOfASequenceHasAnOrder) {
  CampaignResult result = RunConcurrentHistories({.seed = 20261, .operations = 4'000});
  EXPECT_THAT(result.first_failures, ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_GT(result.checked["succeeded"], 1'000);
  EXPECT_GT(result.checked["refused"], 400);
  EXPECT_GT(result.checked["at_the_same_time"], 400);
  EXPECT_LT(result.checked["pool_full"], result.count / 10);
}

TEST(ConcurrentHistoryTest, OldAnswersAreNoticed) {
  const CampaignResult result =
      RunConcurrentHistories({.seed = 5, .operations = 2'000, .is_stale = true});
  EXPECT_GT(result.failures, 3);
}

}  // namespace
}  // namespace kvservice::testing
