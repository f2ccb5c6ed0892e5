#include "kvservice/row_check.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

absl::Status GivenInvalid(std::string_view prefix, const char* name, const std::string& message) {
  const std::string field = std::string(prefix) + name;
  return InvalidField(field, "GIVEN_INVALID", absl::StrCat(field, " ", message));
}

uint64_t EndOf(const AttendCallRow& row) {
  return static_cast<uint64_t>(row.position) + row.query_count;
}

}  // namespace

absl::Status CheckPolicy(std::string_view prefix, const Policy& policy, const ModelSpec& model) {
  const absl::Status status = ValidatePolicy(policy, model.layer_count, model.layout.kv_head_count);
  if (status.ok()) return status;
  // The selector's message starts with the path of the field.
  const std::string message = absl::StrCat(std::string(prefix), status.message());
  return InvalidField(message.substr(0, message.find(' ')), "POLICY_INVALID", message);
}

absl::Status CheckRow(const AttendCall& call, uint32_t index, bool seen) {
  const AttendCallRow& row = call.rows[index];
  const std::string field = absl::StrCat("rows[", index, "].");
  if (row.query_count == 0 || row.query_count > kQueryTokensMax) {
    return InvalidField(field + "query_count", "QUERY_COUNT_OUT_OF_RANGE",
                        absl::StrCat(field, "query_count is ", row.query_count, ", expected 1 to ",
                                     kQueryTokensMax));
  }
  for (uint32_t i = 0; seen && i < index; ++i) {
    const AttendCallRow& earlier = call.rows[i];
    if (earlier.id != row.id) continue;
    if (EndOf(earlier) <= row.position || EndOf(row) <= earlier.position) continue;
    return InvalidField(field + "position", "ROWS_OVERLAP",
                        absl::StrCat(field, "position names tokens that rows[", i,
                                     "] of the same sequence names too"));
  }
  return absl::OkStatus();
}

absl::Status CheckGiven(std::string_view prefix, const AttendCallRow& row, uint32_t kv_head_count,
                        uint64_t end) {
  const auto& offsets = row.given_offsets;
  if (offsets.size() != kv_head_count + size_t{1}) {
    return GivenInvalid(
        prefix, "given_offsets",
        absl::StrCat("has ", offsets.size(), " entries, expected ", kv_head_count + 1));
  }
  if (offsets.front() != 0 || offsets.back() != row.given.size()) {
    return GivenInvalid(prefix, "given_offsets",
                        absl::StrCat("go from ", offsets.front(), " to ", offsets.back(),
                                     ", expected 0 to ", row.given.size()));
  }
  for (uint32_t head = 0; head < kv_head_count; ++head) {
    if (offsets[head] > offsets[head + 1] || offsets[head + 1] > row.given.size()) {
      return GivenInvalid(prefix, "given_offsets",
                          absl::StrCat("fall or end too late after KV head ", head));
    }
    for (uint32_t i = offsets[head]; i < offsets[head + 1]; ++i) {
      const bool ascends = i == offsets[head] || row.given[i - 1] < row.given[i];
      if (ascends && row.given[i] < end) continue;
      return GivenInvalid(prefix, "given_positions",
                          absl::StrCat("has ", row.given[i], " at ", i,
                                       ", expected ascending positions below ", end));
    }
  }
  return absl::OkStatus();
}

}  // namespace kvservice
