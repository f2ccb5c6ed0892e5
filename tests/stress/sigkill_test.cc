// The short form of the kill campaign; kvstress runs the long one.

#include "tests/stress/sigkill.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvservice::testing {
namespace {

TEST(SigkillTest, NothingAcknowledgedIsLostWithTheProcess) {
  CampaignResult result = RunSigkills({.seed = 11, .kills = 12});
  EXPECT_THAT(result.first_failures, ::testing::ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_EQ(result.count, 12);
  EXPECT_GT(result.checked["durable_tokens"], 500);
}

}  // namespace
}  // namespace kvservice::testing
