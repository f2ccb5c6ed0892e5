// How often sampled certificates are wrong on populations made for it: a fixed hostile cache, a
// fresh key for every repetition, exact binomial tests of the misses.

#ifndef KVSERVICE_TESTS_ADVERSARY_COVERAGE_RUNS_H_
#define KVSERVICE_TESTS_ADVERSARY_COVERAGE_RUNS_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "tests/adversary/tally.h"

namespace kvservice::adversary {

struct CoverageOptions {
  std::vector<std::string> devices = {"cpu"};
  // To judge in all: shared by populations, failure probabilities and plans.
  uint64_t certificates = 200'000;
  // Nothing is begun after that.
  double seconds = std::numeric_limits<double>::infinity();
  uint64_t seed = 1;
  uint32_t thread_count = 1;
  // Calls between looks at how many certificates there are: what is run does not depend on the
  // number of threads.
  uint64_t round_calls = 256;
};

// Prints a line per population. The error of NewDevice.
absl::Status MeasureCoverage(const CoverageOptions& options, Tally* tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_COVERAGE_RUNS_H_
