// What a tenant may use of the server, and what it uses. Pure data; any thread.

#ifndef KVSERVICE_KVSERVICE_QUOTA_H_
#define KVSERVICE_KVSERVICE_QUOTA_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace kvservice {

struct TenantQuota {
  // Most bytes of the pool that its blocks may take; absent = all that nobody else has reserved.
  std::optional<uint64_t> pool_bytes_max = std::nullopt;
  // Bytes of the pool that others cannot take, whether they are used or not.
  uint64_t pool_bytes_reserved = 0;
  // Most bytes of rows in the disk tier; absent = all that there is room for.
  std::optional<uint64_t> disk_bytes_max = std::nullopt;

  friend bool operator==(const TenantQuota&, const TenantQuota&) = default;
};

// By tenant.
using TenantQuotas = std::map<std::string, TenantQuota, std::less<>>;

// Quotas that a server has at a time, those of its configuration included.
inline constexpr size_t kTenantQuotasMax = 4096;

struct TenantUsage {
  std::string tenant;
  uint32_t sequence_count = 0;
  // Each block counts once, however many sequences share it.
  uint64_t pool_bytes_used = 0;
  uint64_t block_count = 0;
  // Rows in the disk tier.
  uint64_t disk_bytes_used = 0;
  TenantQuota quota;
  // The quota is not the configured one: it ends with the process.
  bool is_temporary = false;
};

// INVALID_ARGUMENT / QUOTA_INVALID when the quota reserves more than its own maximum, or more of
// the pool than the others leave. Errors name the field behind `prefix`.
absl::Status CheckQuota(const std::string& prefix, const TenantQuota& quota,
                        uint64_t reserved_by_others, uint64_t pool_bytes);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_QUOTA_H_
