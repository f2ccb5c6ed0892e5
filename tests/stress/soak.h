// The soak: minutes of mixed load on a server of its own process, and what it keeps of it.

#ifndef KVSERVICE_TESTS_STRESS_SOAK_H_
#define KVSERVICE_TESTS_STRESS_SOAK_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct SoakOptions {
  uint64_t seed = 1;
  uint64_t seconds = 600;
};

// A failure: an error that is not a refusal, blocks, sequences or descriptors that stay when all
// clients have gone, a heap that grows over the second half by more than its noise, a resident
// memory that does by more than 4 MiB and more than its noise, or a server that does not end well.
// Seconds are counted.
CampaignResult RunSoak(const SoakOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_SOAK_H_
