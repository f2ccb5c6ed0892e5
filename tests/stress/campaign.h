// What a campaign found: counts, and the first failures in words.

#ifndef KVSERVICE_TESTS_STRESS_CAMPAIGN_H_
#define KVSERVICE_TESTS_STRESS_CAMPAIGN_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace kvservice::testing {

struct CampaignResult {
  // Cuts, kills or flips.
  uint64_t count = 0;
  uint64_t failures = 0;
  std::vector<std::string> first_failures;
  // What was looked at, by name: so that a campaign that checks nothing shows.
  std::map<std::string, uint64_t> checked;

  void Fail(const std::string& problem) {
    constexpr size_t kToldMax = 8;
    ++failures;
    if (first_failures.size() < kToldMax) first_failures.push_back(problem);
  }
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_CAMPAIGN_H_
