// Policies that callers may name instead of spelling out: filled before the server starts, then
// read by any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_
#define KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_

#include <cstddef>
#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "selector/policy.h"

namespace kvservice {

inline constexpr size_t kNamedPoliciesMax = 1024;

class PolicyRegistry {
 public:
  // Holds the selectors' default policies under their names in lower case: "auto", "dense",
  // "given", "cis", "psaw", "etf", "cpe", "certified", "scan".
  PolicyRegistry();

  // ALREADY_EXISTS when the name is taken, RESOURCE_EXHAUSTED beyond kNamedPoliciesMax.
  absl::Status Add(std::string name, const Policy& policy);
  // nullptr when there is no policy of that name.
  const Policy* Find(std::string_view name) const;

 private:
  std::map<std::string, Policy, std::less<>> policies_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_
