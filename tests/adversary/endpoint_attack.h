// Attacks a server through the client library: what a worker receives is what is judged. Caches,
// queries and truth are those of the attacks on devices; plans are what the server makes of a
// policy.

#ifndef KVSERVICE_TESTS_ADVERSARY_ENDPOINT_ATTACK_H_
#define KVSERVICE_TESTS_ADVERSARY_ENDPOINT_ATTACK_H_

#include <cstdint>
#include <limits>
#include <string>

#include "absl/status/status.h"
#include "tests/adversary/tally.h"

namespace kvservice::adversary {

struct EndpointOptions {
  std::string endpoint;
  uint64_t certificates = 200'000;
  // Nothing is begun after that.
  double seconds = std::numeric_limits<double>::infinity();
  uint64_t seed = 1;
  // Not 0: this case alone.
  uint64_t case_seed = 0;
  uint32_t thread_count = 1;
};

// Errors of connecting and registering. Errors of calls are counted as contradictions.
absl::Status AttackEndpoint(const EndpointOptions& options, Tally* tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_ENDPOINT_ATTACK_H_
