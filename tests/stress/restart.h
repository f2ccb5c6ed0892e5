// How long a restart takes with much on disk.

#ifndef KVSERVICE_TESTS_STRESS_RESTART_H_
#define KVSERVICE_TESTS_STRESS_RESTART_H_

#include <cstdint>
#include <string>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct RestartOptions {
  uint64_t seed = 1;
  // Of keys, values and sketches.
  uint64_t gib = 10;
};

// Fills a store in a temporary folder with sequences of 64 MiB, closes it, and opens it with a new
// engine: `checked` has the milliseconds until that engine has answered its first Attend, of a
// sequence that has to be read. `count` is the GiB; a failure is five seconds or more, or an answer
// that differs from the one before the close.
CampaignResult RunRestart(const RestartOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_RESTART_H_
