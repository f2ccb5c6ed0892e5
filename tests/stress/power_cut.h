// The power-cut campaign: an engine works for a client with a ledger, the power goes in the middle
// of some operation of the file system, and after the restart every sequence is compared with the
// ledger.

#ifndef KVSERVICE_TESTS_STRESS_POWER_CUT_H_
#define KVSERVICE_TESTS_STRESS_POWER_CUT_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct PowerCutOptions {
  uint64_t seed = 1;
  uint64_t cuts = 200;
  // The disk acknowledges syncs of logs and does nothing: the campaign must notice.
  bool ignore_log_syncs = false;
};

// A failure is an acknowledged durable token that is gone, a byte that was not sent there, a
// sequence that came back after its drop was acknowledged, a hole, a suspended sequence that is
// not, a handle of before the crash that is still taken, or a store that does not open.
CampaignResult RunPowerCuts(const PowerCutOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_POWER_CUT_H_
