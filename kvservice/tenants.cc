#include "kvservice/tenants.h"

#include <algorithm>
#include <cassert>

#include "absl/strings/str_cat.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

OwnerLimits LimitsOf(const TenantQuota& quota) {
  return {.bytes_max = quota.pool_bytes_max.value_or(SIZE_MAX),
          .bytes_reserved = quota.pool_bytes_reserved};
}

absl::Status QuotasFull() {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("there are quotas of ", kTenantQuotasMax, " tenants, the most"),
                   {.reason = "QUOTAS_FULL",
                    .field = "",
                    .metadata = {{"quotas_max", absl::StrCat(kTenantQuotasMax)}}});
}

}  // namespace

absl::Status CheckQuotas(const EngineOptions& options) {
  if (options.tenant_quotas.size() > kTenantQuotasMax) return QuotasFull();
  absl::Status status =
      CheckQuota("", options.quota_default, options.memory_bytes(), options.memory_bytes());
  uint64_t reserved = 0;
  for (const auto& [tenant, quota] : options.tenant_quotas) {
    if (status.ok()) status = CheckQuota("", quota, reserved, options.memory_bytes());
    reserved += quota.pool_bytes_reserved;
  }
  return status;
}

Tenants::Tenants(const EngineOptions* options, BlockPool* pool, const SequenceTable* table)
    : options_(options), pool_(pool), table_(table) {
  pool_->mutable_limits()->SetDefaults(LimitsOf(options->quota_default));
  for (const auto& [tenant, quota] : options->tenant_quotas) {
    pool_->mutable_limits()->SetLimits(pool_->OwnerOf(tenant), LimitsOf(quota));
  }
}

const TenantQuota& Tenants::ConfiguredOf(std::string_view tenant) const {
  const auto configured = options_->tenant_quotas.find(tenant);
  return configured == options_->tenant_quotas.end() ? options_->quota_default : configured->second;
}

const TenantQuota& Tenants::QuotaOf(std::string_view tenant) const {
  const auto found = set_.find(tenant);
  return found == set_.end() ? ConfiguredOf(tenant) : found->second;
}

uint64_t Tenants::DiskBytesOf(std::string_view tenant) const {
  const auto found = disk_bytes_.find(tenant);
  return found == disk_bytes_.end() ? 0 : found->second;
}

absl::Status Tenants::SetQuota(const std::string& tenant, const std::optional<TenantQuota>& quota) {
  const TenantQuota& next = quota.has_value() ? *quota : ConfiguredOf(tenant);
  const uint64_t reserved_by_others =
      pool_->accounts().bytes_reserved() - QuotaOf(tenant).pool_bytes_reserved;
  const absl::Status status = CheckQuota("quota.", next, reserved_by_others, pool_->bytes());
  if (!status.ok()) return status;
  if (!quota.has_value() && !set_.contains(tenant)) return absl::OkStatus();
  const bool is_new = quota.has_value() && !set_.contains(tenant);
  if (is_new && set_.size() + options_->tenant_quotas.size() >= kTenantQuotasMax) {
    return QuotasFull();
  }
  pool_->mutable_limits()->SetLimits(pool_->OwnerOf(tenant), LimitsOf(next));
  if (quota.has_value()) {
    set_[tenant] = *quota;
  } else {
    set_.erase(tenant);
  }
  return absl::OkStatus();
}

TenantUsage Tenants::UsageOf(const std::string& tenant) const {
  // Asking about a tenant leaves nothing behind.
  const OwnerAccount account = pool_->accounts().Of(pool_->owners().Find(tenant));
  return {.tenant = tenant,
          .sequence_count = table_->CountOf(tenant),
          .pool_bytes_used = account.bytes,
          .block_count = account.blocks,
          .disk_bytes_used = DiskBytesOf(tenant),
          .quota = QuotaOf(tenant),
          .is_temporary = set_.contains(tenant)};
}

std::vector<TenantUsage> Tenants::List(std::string_view after, uint32_t limit) const {
  std::vector<TenantUsage> listed;
  pool_->owners().ForEachAfter(after, [&](const std::string& tenant, BlockOwner) {
    if (listed.size() >= limit) return false;
    TenantUsage usage = UsageOf(tenant);
    const bool uses_something =
        usage.sequence_count > 0 || usage.block_count > 0 || usage.disk_bytes_used > 0;
    if (uses_something || usage.is_temporary || options_->tenant_quotas.contains(tenant)) {
      listed.push_back(std::move(usage));
    }
    return true;
  });
  return listed;
}

absl::Status Tenants::CheckDisk(std::string_view tenant, uint64_t more_bytes) const {
  const std::optional<uint64_t> bytes_max = QuotaOf(tenant).disk_bytes_max;
  if (!bytes_max.has_value() || more_bytes == 0) return absl::OkStatus();
  const uint64_t used = DiskBytesOf(tenant);
  if (used <= *bytes_max && more_bytes <= *bytes_max - used) return absl::OkStatus();
  return TenantDiskFull(used, *bytes_max);
}

void Tenants::AddDiskBytes(const std::string& tenant, uint64_t bytes) {
  if (bytes > 0) disk_bytes_[tenant] += bytes;
}

void Tenants::SubtractDiskBytes(const std::string& tenant, uint64_t bytes) {
  const auto found = disk_bytes_.find(tenant);
  if (found == disk_bytes_.end()) return;
  assert(found->second >= bytes);
  found->second -= bytes;
  if (found->second == 0) disk_bytes_.erase(found);
}

}  // namespace kvservice
