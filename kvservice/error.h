// Typed errors: an absl::Status whose payloads carry what a caller's program needs (reason, field,
// numbers, retry delay), so that the server can turn them into google.rpc details without parsing
// text. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_ERROR_H_
#define KVSERVICE_KVSERVICE_ERROR_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace kvservice {

struct ErrorDetails {
  // UPPER_SNAKE, stable across releases: "TENSOR_SHAPE_MISMATCH", "POSITION_GAP", ... Empty for
  // errors without a type.
  std::string reason;
  // Path of the offending request field ("rows[2].position"), empty when no field is to blame.
  std::string field;
  // Everything variable in the message, key and value.
  std::vector<std::pair<std::string, std::string>> metadata;
  // 0 = do not retry on this hint.
  uint32_t retry_delay_ms = 0;
};

absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       const ErrorDetails& details);

// INVALID_ARGUMENT with a field.
absl::Status InvalidField(std::string_view field, std::string_view reason,
                          std::string_view message);

// Details of any status; empty for a status not made here.
ErrorDetails DetailsOf(const absl::Status& status);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ERROR_H_
