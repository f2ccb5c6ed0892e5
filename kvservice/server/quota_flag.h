// --tenant-quota: what one tenant may use, or everybody that has no quota of its own.
//
//     tenant=NAME,pool-max=8GiB,pool-reserved=1GiB,disk-max=20GiB
//     pool-max=4GiB
//
// Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_QUOTA_FLAG_H_
#define KVSERVICE_KVSERVICE_SERVER_QUOTA_FLAG_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "kvservice/quota.h"

namespace kvservice {

struct QuotaFlag {
  // Empty = everybody else.
  std::string tenant;
  TenantQuota quota;
};

// INVALID_ARGUMENT with what is wrong with the text.
absl::StatusOr<QuotaFlag> ParseQuotaFlag(const std::string& text);

// Puts all of them into the options, whose pool is known. INVALID_ARGUMENT for a tenant that comes
// twice and for what is reserved and not there.
absl::Status AddQuotaFlags(const std::vector<std::string>& texts, EngineOptions* options);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_QUOTA_FLAG_H_
