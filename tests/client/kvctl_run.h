// kvctl as scripts run it: through the shell, with nothing on stdin.

#ifndef KVSERVICE_TESTS_CLIENT_KVCTL_RUN_H_
#define KVSERVICE_TESTS_CLIENT_KVCTL_RUN_H_

#include <string>

#include "kvservice/engine.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {

struct Outcome {
  // -1 if a signal ended it.
  int exit = -1;
  std::string out;
  std::string err;
};

// environment: "NAME='value' ..." in the shell's syntax, as are the arguments.
Outcome RunKvctl(const std::string& environment, const std::string& arguments);

// Both endpoints of a served engine, as such an environment.
std::string EnvironmentOf(const ServedEngine& served);

// An empty sequence of the default tenant.
Handle NewHandle(const ServedEngine& served);

// A sequence of the default tenant with 100 tokens whose last one was attended, in all layers.
// Returns its id in hexadecimal.
std::string MakeSequence(const ServedEngine& served);

// On a device whose bounds are too small by a thousandth; every row is audited.
ServedEngineOptions WithWrongBounds();
// A sequence there whose one Attend was certified. Returns its id in hexadecimal.
std::string MakeWronglyBounded(const ServedEngine& served);

std::string HexOf(const SequenceId& id);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_CLIENT_KVCTL_RUN_H_
