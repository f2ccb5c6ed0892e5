// Runs test bodies on every instruction set that the kernels are compiled for and this machine has.

#ifndef KVSERVICE_TESTS_ATTENTION_CPU_TARGETS_H_
#define KVSERVICE_TESTS_ATTENTION_CPU_TARGETS_H_

#include <gtest/gtest.h>

// clang-format off
#include "attention/cpu/targets.h"
#include "hwy/highway.h"
#include "hwy/targets.h"
// clang-format on

namespace kvservice::testing {

// Calls body() once per target, with every kernel dispatched to it.
template <typename Body>
void OnEveryTarget(const Body& body) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(::testing::Message() << "target " << hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_CPU_TARGETS_H_
