// The campaign of input/output faults: every operation on files of one workload goes wrong in every
// way, one at a time. The workload creates, appends in memory and durably, suspends, resumes,
// forks, truncates, drops, crashes, closes and opens again.

#ifndef KVSERVICE_TESTS_STRESS_IO_FAULT_H_
#define KVSERVICE_TESTS_STRESS_IO_FAULT_H_

#include <cstdint>
#include <string>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct IoFaultOptions {
  uint64_t seed = 1;
  // A random part of all (operation, fault); 0 = all.
  uint64_t faults = 0;
  // Operations of this name alone; empty = all.
  std::string only = {};
  // Appends and syncs that fail do not say so: the campaign must notice.
  bool hides = false;
};

// A failure: an error without a type, or one that no fault explains; after the fault is over and
// the store was opened again, an acknowledged durable token that is gone, a byte that was not sent
// there, a sequence that is gone or damaged though no read was wrong, a dropped one that is back, a
// store that does not open; or a fault that could not be brought about.
CampaignResult RunIoFaults(const IoFaultOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_IO_FAULT_H_
