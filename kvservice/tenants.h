// What each tenant may use, and uses: the quotas in force, handed to the pool, and the bytes of
// rows on disk. Quotas that were set later go before those of the configuration, and end with the
// process. Executor thread.

#ifndef KVSERVICE_KVSERVICE_TENANTS_H_
#define KVSERVICE_KVSERVICE_TENANTS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/engine.h"
#include "kvservice/quota.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// Of all quotas of the options, as CheckQuota.
absl::Status CheckQuotas(const EngineOptions& options);

class Tenants {
 public:
  // Borrows; the options' quotas are right.
  Tenants(const EngineOptions* options, BlockPool* pool, const SequenceTable* table);

  // From now on; nothing = what the options say. INVALID_ARGUMENT / QUOTA_INVALID or
  // RESOURCE_EXHAUSTED / QUOTAS_FULL; nothing is then changed.
  absl::Status SetQuota(const std::string& tenant, const std::optional<TenantQuota>& quota);
  TenantUsage UsageOf(const std::string& tenant) const;
  // Those that use something or have a quota of their own, by name, at most `limit` after `after`.
  std::vector<TenantUsage> List(std::string_view after, uint32_t limit) const;
  // Those that have sequences.
  uint32_t count() const { return table_->tenant_count(); }

  // RESOURCE_EXHAUSTED / TENANT_QUOTA when so many bytes more of rows are too many for the tenant.
  absl::Status CheckDisk(std::string_view tenant, uint64_t more_bytes) const;
  void AddDiskBytes(const std::string& tenant, uint64_t bytes);
  void SubtractDiskBytes(const std::string& tenant, uint64_t bytes);

  // Calls `visit(owner)` for all that have more of the pool than they may: after a quota went down.
  template <typename Visit>
  void ForEachBeyondMax(Visit visit) const {
    for (BlockOwner owner = 1; owner < pool_->accounts().end(); ++owner) {
      if (pool_->accounts().BeyondMax(owner, 0) > 0) visit(owner);
    }
  }

 private:
  const TenantQuota& ConfiguredOf(std::string_view tenant) const;
  const TenantQuota& QuotaOf(std::string_view tenant) const;
  uint64_t DiskBytesOf(std::string_view tenant) const;

  const EngineOptions* const options_;
  BlockPool* const pool_;
  const SequenceTable* const table_;

  // Set later.
  TenantQuotas set_;
  // Tenants that have rows on disk.
  std::map<std::string, uint64_t, std::less<>> disk_bytes_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TENANTS_H_
