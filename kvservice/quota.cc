#include "kvservice/quota.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {

absl::Status CheckQuota(const std::string& prefix, const TenantQuota& quota,
                        uint64_t reserved_by_others, uint64_t pool_bytes) {
  const std::string field = prefix + "pool_bytes_reserved";
  const auto invalid = [&](const std::string& problem) {
    return InvalidField(field, "QUOTA_INVALID", absl::StrCat(field, problem));
  };
  const uint64_t reserved = quota.pool_bytes_reserved;
  if (quota.pool_bytes_max.has_value() && reserved > *quota.pool_bytes_max) {
    return invalid(absl::StrCat(" is ", reserved, ", more than pool_bytes_max, which is ",
                                *quota.pool_bytes_max));
  }
  const uint64_t left = pool_bytes - std::min(pool_bytes, reserved_by_others);
  if (reserved > left) {
    return invalid(absl::StrCat(" is ", reserved, ", of the pool's ", pool_bytes, " bytes ", left,
                                " are not reserved for others"));
  }
  return absl::OkStatus();
}

}  // namespace kvservice
