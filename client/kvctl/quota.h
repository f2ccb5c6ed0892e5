// What tenants may use and use, as kvctl shows and sets it. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_QUOTA_H_
#define KVSERVICE_CLIENT_KVCTL_QUOTA_H_

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "client/kvctl/commands.h"
#include "kvservice/v1/admin.pb.h"

namespace kvservice::client {

struct QuotaListOptions {
  // Empty = all.
  std::string tenant;
  size_t limit = 1000;
};

// A maximum as a person gives it; kNoMaximum = there shall be none.
inline constexpr uint64_t kNoMaximum = UINT64_MAX;

struct QuotaSetOptions {
  std::string tenant;
  // What is not given stays as it is.
  std::optional<uint64_t> pool_bytes_max;
  std::optional<uint64_t> pool_bytes_reserved;
  std::optional<uint64_t> disk_bytes_max;
  bool yes = false;
};

int ListQuotas(const GlobalOptions& options, const QuotaListOptions& list);
// Asks for confirmation, as DropSequence does, when a maximum is below what is used.
int SetQuota(const GlobalOptions& options, const QuotaSetOptions& set);
// The configured one again.
int ResetQuota(const GlobalOptions& options, const std::string& tenant);

nlohmann::ordered_json ToJson(const v1::TenantUsage& usage);
std::string ToTable(const std::vector<v1::TenantUsage>& usages);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_QUOTA_H_
