// Policies between the wire and the engine. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_CONVERT_POLICY_H_
#define KVSERVICE_KVSERVICE_SERVER_CONVERT_POLICY_H_

#include <string_view>

#include "absl/status/statusor.h"
#include "kvservice/server/policy_registry.h"
#include "kvservice/v1/types.pb.h"
#include "selector/policy.h"

namespace kvservice {

// The policy that `policy` asks for: a named one, or the selector's default with the fields that
// are present on top. `field` is its path in the request ("rows[2].policy"). NOT_FOUND /
// POLICY_NOT_FOUND for an unknown name; INVALID_ARGUMENT / POLICY_INVALID for unknown enum values,
// numbers out of range and fields beside a name; INVALID_ARGUMENT / NOT_SERVED for limits that are
// not served yet.
absl::StatusOr<Policy> PolicyFromProto(const v1::Policy& policy, std::string_view field,
                                       const PolicyRegistry& registry);

// Every field spelt out.
v1::Policy PolicyToProto(const Policy& policy);

v1::Selector SelectorToProto(SelectorKind selector);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CONVERT_POLICY_H_
