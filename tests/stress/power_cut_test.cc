// The short form of the power-cut campaign; kvstress runs the long one.

#include "tests/stress/power_cut.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvservice::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(PowerCutTest, NothingAcknowledgedIsLostAndNothingElseComesBack) {
  CampaignResult result = RunPowerCuts({.seed = 20261, .cuts = 400});
  EXPECT_THAT(result.first_failures, ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_EQ(result.count, 400);
  EXPECT_GT(result.checked["durable_tokens"], 50'000);
  EXPECT_GT(result.checked["dropped_sequences"], 50);
}

TEST(PowerCutTest, ADiskThatDoesNotSyncIsNoticed) {
  // A store that finds out by itself is refused, and the next one is begun.
  const CampaignResult result = RunPowerCuts({.seed = 7, .cuts = 500, .ignore_log_syncs = true});
  EXPECT_GT(result.failures, 10);
  EXPECT_THAT(result.first_failures, Contains(HasSubstr("acknowledged as durable")));
}

}  // namespace
}  // namespace kvservice::testing
