#include "kvservice/server/policy_registry.h"

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

const Policy* PolicyRegistry::Find(std::string_view name) const {
  const auto found = policies_.find(name);
  return found == policies_.end() ? nullptr : &found->second;
}

}  // namespace kvservice
