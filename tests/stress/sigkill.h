// The kill campaign: a server process with a data directory works for clients over gRPC, is killed
// in the middle of it, and started again.

#ifndef KVSERVICE_TESTS_STRESS_SIGKILL_H_
#define KVSERVICE_TESTS_STRESS_SIGKILL_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct SigkillOptions {
  uint64_t seed = 1;
  uint64_t kills = 10;
};

// Failures as in the power-cut campaign. Runs the program `kvservice` of $KVSERVICE_BIN_DIR in a
// temporary folder. A kill leaves the page cache alone: it shows what recovery does with the rest
// of a process's work, not what reaches the disk.
CampaignResult RunSigkills(const SigkillOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_SIGKILL_H_
