#include "kvservice/server/policy_registry.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice {

PolicyRegistry::PolicyRegistry()
    : policies_({{"auto", DefaultPolicy(SelectorKind::kAuto)},
                 {"dense", DefaultPolicy(SelectorKind::kDense)},
                 {"given", DefaultPolicy(SelectorKind::kGiven)},
                 {"cis", DefaultPolicy(SelectorKind::kCis)},
                 {"psaw", DefaultPolicy(SelectorKind::kPsaw)},
                 {"etf", DefaultPolicy(SelectorKind::kEtf)},
                 {"cpe", DefaultPolicy(SelectorKind::kCpe)},
                 {"certified", DefaultPolicy(SelectorKind::kCertified)},
                 {"scan", DefaultPolicy(SelectorKind::kScan)}}) {}

absl::Status PolicyRegistry::Add(std::string name, const Policy& policy) {
  if (policies_.size() >= kNamedPoliciesMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat("there are ", policies_.size(), " policies, the most there may be"));
  }
  std::string taken = "name " + name + " is taken";
  const bool added = policies_.try_emplace(std::move(name), policy).second;
  return added ? absl::OkStatus() : absl::AlreadyExistsError(taken);
}

const Policy* PolicyRegistry::Find(std::string_view name) const {
  const auto found = policies_.find(name);
  return found == policies_.end() ? nullptr : &found->second;
}

}  // namespace kvservice
