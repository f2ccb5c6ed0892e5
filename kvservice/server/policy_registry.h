// Policies that callers may name instead of spelling out. Immutable after construction; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_
#define KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_

#include <map>
#include <string>
#include <string_view>

#include "selector/policy.h"

namespace kvservice {

class PolicyRegistry {
 public:
  // Holds the selectors' default policies under their names in lower case: "auto", "dense",
  // "given", "cis", "psaw", "etf", "cpe", "certified", "scan".
  PolicyRegistry();

  // nullptr when there is no policy of that name.
  const Policy* Find(std::string_view name) const;

 private:
  std::map<std::string, Policy, std::less<>> policies_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_POLICY_REGISTRY_H_
