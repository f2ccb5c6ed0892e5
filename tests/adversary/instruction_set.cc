#include "tests/adversary/instruction_set.h"

// clang-format off
#include "attention/cpu/targets.h"
#include "hwy/highway.h"
#include "hwy/targets.h"
// clang-format on

namespace kvservice::adversary {

std::vector<std::string> InstructionSets() {
  // Those that were switched off before count too.
  hwy::SetSupportedTargetsForTest(0);
  std::vector<std::string> names;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    names.emplace_back(hwy::TargetName(target));
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return names;
}

bool UseInstructionSet(const std::string& name) {
  hwy::SetSupportedTargetsForTest(0);
  bool found = name.empty();
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    found = true;
    break;
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return found;
}

}  // namespace kvservice::adversary
