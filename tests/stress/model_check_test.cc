// The short form of the model check; kvstress runs the long one.

#include "tests/stress/model_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvservice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ModelCheckTest, AnEngineDoesWhatAPlainModelSays) {
  CampaignResult result = RunModelCheck({.seed = 20261, .commands = 3'000});
  EXPECT_THAT(result.first_failures, ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_GE(result.count, 3'000);
  EXPECT_GT(result.checked["succeeded"], 1'000);
  EXPECT_GT(result.checked["refused"], 300);
  EXPECT_GT(result.checked["outputs"], 100);
  EXPECT_GT(result.checked["matched"], 5);
  EXPECT_GT(result.checked["reopens"], 10);
  EXPECT_GT(result.checked["seen_on_disk"], 5);
  // Not an excuse for everything.
  EXPECT_LT(result.checked["pool_full"], result.count / 50);
}

TEST(ModelCheckTest, WhatOnceWentWrongDoesNot) {
  const CampaignResult result = RunKnownPrograms();
  EXPECT_THAT(result.first_failures, ElementsAre());
  EXPECT_GT(result.count, 20);
}

TEST(ModelCheckTest, AMistakeIsFoundAndToldInFewCommands) {
  CampaignResult result = RunModelCheck({.seed = 3, .commands = 1'000, .is_mistaken = true});
  ASSERT_GT(result.failures, 0);
  EXPECT_LE(result.checked["shortest"], 4);
  EXPECT_THAT(result.first_failures[0], HasSubstr("truncate has lengths"));
}

}  // namespace
}  // namespace kvservice::testing
