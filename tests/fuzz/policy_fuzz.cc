// The text of a policy file: read, or refused with one line.

#include <cstdlib>
#include <string>

#include "kvservice/server/policy_file.h"
#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  kvservice::PolicyRegistry registry;
  const absl::Status status = kvservice::AddPolicies(text, &registry);
  if (status.ok()) return 0;
  const std::string message(status.message());
  if (message.empty() || message.find('\n') != std::string::npos) std::abort();
  return 0;
}
