// The campaign of concurrent histories: threads append, attend, truncate, suspend, resume and look
// at the same few sequences at the same time, and what they saw of each sequence must be
// linearizable (tests/stress/history.h). Memory is too small for all sequences, so that they leave
// it and come back meanwhile.

#ifndef KVSERVICE_TESTS_STRESS_CONCURRENT_HISTORY_H_
#define KVSERVICE_TESTS_STRESS_CONCURRENT_HISTORY_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct ConcurrentHistoryOptions {
  uint64_t seed = 1;
  uint64_t operations = 2'000;
  // One Get in four is answered with what an earlier one said: the campaign must notice.
  bool is_stale = false;
};

// A failure: a history that no order of its calls explains. Operations are counted.
CampaignResult RunConcurrentHistories(const ConcurrentHistoryOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_CONCURRENT_HISTORY_H_
