// Checks of what one row of an Attend call asks for, apart from its tensors. Pure functions; any
// thread.

#ifndef KVSERVICE_KVSERVICE_ROW_CHECK_H_
#define KVSERVICE_KVSERVICE_ROW_CHECK_H_

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "kvservice/engine.h"
#include "selector/policy.h"

namespace kvservice {

// INVALID_ARGUMENT / POLICY_INVALID naming `prefix` + "policy.<field>".
absl::Status CheckPolicy(std::string_view prefix, const Policy& policy, const ModelSpec& model);

// INVALID_ARGUMENT / QUERY_COUNT_OUT_OF_RANGE; ROWS_OVERLAP if an earlier row of the call names
// tokens of the same sequence that this one names too (looked for only if `seen`: the sequence came
// before).
absl::Status CheckRow(const AttendCall& call, uint32_t index, bool seen);

// INVALID_ARGUMENT / GIVEN_INVALID unless the row's positions are, for every KV head, ascending,
// unique and below `end`.
absl::Status CheckGiven(std::string_view prefix, const AttendCallRow& row, uint32_t kv_head_count,
                        uint64_t end);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ROW_CHECK_H_
