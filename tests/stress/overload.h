// The campaigns of load: a server that is offered ten times what it can do, and a tenant that
// offers so much beside another one.

#ifndef KVSERVICE_TESTS_STRESS_OVERLOAD_H_
#define KVSERVICE_TESTS_STRESS_OVERLOAD_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct OverloadOptions {
  uint64_t seed = 1;
  // Each has all phases; medians over them count.
  uint64_t rounds = 5;
  double phase_seconds = 4.0;
};

// A failure: goodput at ten times the peak below 90 % of the peak, the 99th percentile of what is
// answered above twice that at the peak, more than two seconds until a call is as quick as before,
// or an error that is not OVERLOADED. Rounds are counted; figures are in `checked`.
CampaignResult RunOverload(const OverloadOptions& options);

// A tenant calls steadily while another one offers half of what the server can do, and then ten
// times as much. A failure: the steady tenant's median goes up by more than a quarter, its 99th
// percentile by more than half, or one of its calls is refused.
CampaignResult RunNoisyNeighbour(const OverloadOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_OVERLOAD_H_
