// Policy files as `kvservice --policy-file` takes them: what a calibration writes and a study reads
// back. Only the fields that a calibration sets are known here; the server knows all of them.

#ifndef KVSERVICE_TESTS_EVAL_POLICY_FILE_H_
#define KVSERVICE_TESTS_EVAL_POLICY_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "selector/policy.h"

namespace kvservice::eval {

// JSON text of {"name": name, "policy": {...}} in the proto's spelling: selector, budget,
// cis.min_cosine and the layers' overrides.
std::string PolicyFileText(const std::string& name, const Policy& policy);

// The same back. INVALID_ARGUMENT for a field that it does not know.
absl::StatusOr<Policy> ParsePolicyFile(const std::string& text);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_POLICY_FILE_H_
