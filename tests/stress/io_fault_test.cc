// The short form of the campaign of input/output faults; kvstress runs the long one.

#include "tests/stress/io_fault.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/stress/fault_filesystem.h"

namespace kvservice::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(IoFaultTest, EachErrorHasATypeAndNothingAcknowledgedIsLost) {
  CampaignResult result = RunIoFaults({.seed = 20261, .faults = 30});
  EXPECT_THAT(result.first_failures, ElementsAre());
  EXPECT_EQ(result.failures, 0);
  EXPECT_EQ(result.checked["brought_about"], 30);
  EXPECT_GT(result.checked["operations"], 400);
  EXPECT_GT(result.checked["errors"], 30);
  EXPECT_GT(result.checked["durable_tokens"], 20'000);
}

TEST(IoFaultTest, ADiskThatHidesItsFaultsIsNoticed) {
  const CampaignResult result =
      RunIoFaults({.seed = 7, .faults = 25, .only = "sync log", .hides = true});
  EXPECT_GT(result.failures, 0);
  EXPECT_THAT(result.first_failures, Contains(HasSubstr("acknowledged as durable")));
}

TEST(FaultFilesystemTest, EachFaultCanHappenToSomething) {
  for (const Fault fault : kFaults) {
    const bool anywhere = Applies(fault, "append log") || Applies(fault, "read sst");
    EXPECT_TRUE(anywhere) << FaultName(fault);
  }
  EXPECT_FALSE(Applies(Fault::kFlippedRead, "append log"));
  EXPECT_FALSE(Applies(Fault::kFullOnce, "read sst"));
}

}  // namespace
}  // namespace kvservice::testing
