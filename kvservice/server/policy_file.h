// Files of named policies: what calibration writes and the server reads at start (--policy-file).
//
//     {"name": "smollm2", "policy": {"selector": "SELECTOR_CPE", "layers": {...}}}
//
// or a list of such objects: the JSON image of kvservice.v1.NamedPolicy. Fields that are absent
// mean the same as in a request. Pure functions but for the file they read; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_POLICY_FILE_H_
#define KVSERVICE_KVSERVICE_SERVER_POLICY_FILE_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "kvservice/server/policy_registry.h"
#include "selector/policy.h"

namespace kvservice {

// A larger file is a mistake: a policy with numbers for every KV head of a large model takes some
// kilobytes.
inline constexpr size_t kPolicyFileBytesMax = size_t{1} << 20;

// Adds the policies of a text to the registry. INVALID_ARGUMENT with one line that names the entry
// and the field ("[1] (fast): policy.cis.min_cosine is 2, expected -1 to 1"): for text that is no
// such JSON, fields that do not exist, values out of range, names that are taken or no names, and
// too many policies. Entries before the one that is wrong may have been added.
//
// What needs a model (layer numbers, one cosine per KV head) is checked when a request names the
// policy. A policy may itself be a name, of an earlier one: then it is another name for it.
absl::Status AddPolicies(std::string_view text, PolicyRegistry* registry);

// The same for a file. Also NOT_FOUND; all messages start with the path.
absl::Status AddPolicyFile(const std::string& path, PolicyRegistry* registry);

// The text of a file with this one policy, every field spelt out; AddPolicies reads it back to the
// same policy.
std::string PolicyFileText(std::string_view name, const Policy& policy);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_POLICY_FILE_H_
