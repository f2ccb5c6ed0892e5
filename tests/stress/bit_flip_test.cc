// The short form of the bit-flip campaign; kvstress runs the long one.

#include "tests/stress/bit_flip.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvservice::testing {
namespace {

TEST(BitFlipTest, DamageIsToldAndNeverServed) {
  CampaignResult result = RunBitFlips({.seed = 4, .flips = 400});
  EXPECT_THAT(result.first_failures, ::testing::ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_EQ(result.count, 400);
  // The damage reached all kinds of places.
  EXPECT_GT(result.checked["refused_stores"], 20);
  EXPECT_GT(result.checked["sequences_lost_aloud"], 50);
  EXPECT_GT(result.checked["sequences_whole"], 400);
  // Damage of one sequence is not everybody's: the disk goes on being written to.
  EXPECT_LT(result.checked["sequences_unavailable"], 20);
}

}  // namespace
}  // namespace kvservice::testing
