#include "client/kvctl/quota.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "client/kvctl/outcome.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;

std::string MaximumText(bool is_there, uint64_t bytes) { return is_there ? BytesText(bytes) : "-"; }

Json MaximumOrNull(bool is_there, uint64_t bytes) { return is_there ? Json(bytes) : Json(nullptr); }

int ShowUsage(const GlobalOptions& options, const absl::StatusOr<v1::SetQuotaResponse>& response) {
  if (!response.ok()) return Fail(options, response.status());
  Print(options, ToJson(response->usage()), ToTable({response->usage()}));
  return kExitOk;
}

// What is in force, with what was given in its place.
v1::TenantQuota Changed(v1::TenantQuota quota, const QuotaSetOptions& set) {
  if (set.pool_bytes_max.has_value()) {
    quota.set_pool_bytes_max(*set.pool_bytes_max);
    if (*set.pool_bytes_max == kNoMaximum) quota.clear_pool_bytes_max();
  }
  if (set.pool_bytes_reserved.has_value()) quota.set_pool_bytes_reserved(*set.pool_bytes_reserved);
  if (set.disk_bytes_max.has_value()) {
    quota.set_disk_bytes_max(*set.disk_bytes_max);
    if (*set.disk_bytes_max == kNoMaximum) quota.clear_disk_bytes_max();
  }
  return quota;
}

// What the tenant has beyond the quota; empty if nothing.
std::string BeyondText(const v1::TenantUsage& usage, const v1::TenantQuota& quota) {
  std::string text;
  const auto add = [&](const char* where, uint64_t used, uint64_t max) {
    text += (text.empty() ? "" : " and ") + BytesText(used) + " " + where + ", more than " +
            BytesText(max);
  };
  if (quota.has_pool_bytes_max() && usage.pool_used_bytes() > quota.pool_bytes_max()) {
    add("of the pool", usage.pool_used_bytes(), quota.pool_bytes_max());
  }
  if (quota.has_disk_bytes_max() && usage.disk_used_bytes() > quota.disk_bytes_max()) {
    add("on disk", usage.disk_used_bytes(), quota.disk_bytes_max());
  }
  return text;
}

}  // namespace

Json ToJson(const v1::TenantUsage& usage) {
  const v1::TenantQuota& quota = usage.quota();
  return {{"tenant", usage.tenant()},
          {"sequence_count", usage.sequence_count()},
          {"pool_used_bytes", usage.pool_used_bytes()},
          {"block_count", usage.block_count()},
          {"disk_used_bytes", usage.disk_used_bytes()},
          {"pool_bytes_max", MaximumOrNull(quota.has_pool_bytes_max(), quota.pool_bytes_max())},
          {"pool_bytes_reserved", quota.pool_bytes_reserved()},
          {"disk_bytes_max", MaximumOrNull(quota.has_disk_bytes_max(), quota.disk_bytes_max())},
          {"temporary", usage.temporary()}};
}

std::string ToTable(const std::vector<v1::TenantUsage>& usages) {
  std::vector<Row> rows = {{"TENANT", "SEQUENCES", "POOL USED", "POOL MAX", "POOL RESERVED",
                            "DISK USED", "DISK MAX", "LASTS"}};
  for (const v1::TenantUsage& usage : usages) {
    const v1::TenantQuota& quota = usage.quota();
    rows.push_back({usage.tenant(), std::to_string(usage.sequence_count()),
                    BytesText(usage.pool_used_bytes()),
                    MaximumText(quota.has_pool_bytes_max(), quota.pool_bytes_max()),
                    BytesText(quota.pool_bytes_reserved()), BytesText(usage.disk_used_bytes()),
                    MaximumText(quota.has_disk_bytes_max(), quota.disk_bytes_max()),
                    usage.temporary() ? "until restart" : "-"});
  }
  return Table(rows);
}

int ListQuotas(const GlobalOptions& options, const QuotaListOptions& list) {
  bool more = false;
  const absl::StatusOr<std::vector<v1::TenantUsage>> usages =
      Connect(options)->ListTenants(list.tenant, list.limit, &more);
  if (!usages.ok()) return Fail(options, usages.status());
  Json json = ArrayOf("tenants", *usages);
  json["more"] = more;
  Print(options, json, ToTable(*usages));
  if (more && !options.quiet) {
    std::cerr << "kvctl: there are more than " << list.limit << "; see --limit" << std::endl;
  }
  return kExitOk;
}

int SetQuota(const GlobalOptions& options, const QuotaSetOptions& set) {
  if (!set.pool_bytes_max && !set.pool_bytes_reserved && !set.disk_bytes_max) {
    return Usage(options, "give --pool-max, --pool-reserved or --disk-max");
  }
  const std::unique_ptr<ServerCalls> calls = Connect(options);
  bool more = false;
  const auto usages = calls->ListTenants(set.tenant, 1, &more);
  if (!usages.ok()) return Fail(options, usages.status());
  if (usages->empty()) return Fail(options, absl::NotFoundError("there is no such tenant"));
  v1::SetQuotaRequest request;
  request.set_tenant(set.tenant);
  *request.mutable_quota() = Changed(usages->front().quota(), set);
  const std::string beyond = BeyondText(usages->front(), request.quota());
  if (!beyond.empty()) {
    const std::optional<int> refused =
        Refused(options, set.yes,
                set.tenant + " has " + beyond +
                    ": it gets no more, and its least recently used sequences leave memory",
                set.tenant);
    if (refused.has_value()) return *refused;
  }
  return ShowUsage(options, calls->SetQuota(request));
}

int ResetQuota(const GlobalOptions& options, const std::string& tenant) {
  v1::SetQuotaRequest request;
  request.set_tenant(tenant);
  return ShowUsage(options, Connect(options)->SetQuota(request));
}

}  // namespace kvservice::client
