#include "kvservice/server/quota_flag.h"

#include <optional>
#include <set>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/quantity.h"
#include "kvservice/tenants.h"

namespace kvservice {
namespace {

absl::Status Invalid(const std::string& text, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("'", text, "': ", problem));
}

}  // namespace

absl::StatusOr<QuotaFlag> ParseQuotaFlag(const std::string& text) {
  QuotaFlag flag;
  std::set<std::string> seen;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<std::string> words = absl::StrSplit(part, absl::MaxSplits('=', 1));
    if (words.size() != 2) {
      return Invalid(text,
                     "expected tenant=NAME,pool-max=BYTES,pool-reserved=BYTES,disk-max=BYTES");
    }
    const auto& [key, value] = std::tie(words[0], words[1]);
    if (!seen.insert(key).second) return Invalid(text, absl::StrCat(key, " comes twice"));
    if (key == "tenant") {
      if (!IsTenantName(value)) {
        return Invalid(text, "a tenant is 1 to 64 characters of [A-Za-z0-9_.-]");
      }
      flag.tenant = value;
      continue;
    }
    const std::optional<uint64_t> bytes = ParseBytes(value);
    if (!bytes.has_value()) {
      return Invalid(text, absl::StrCat("'", value, "' is not like 4GiB, 512MiB or 65536"));
    }
    if (key == "pool-max") {
      flag.quota.pool_bytes_max = bytes;
    } else if (key == "pool-reserved") {
      flag.quota.pool_bytes_reserved = *bytes;
    } else if (key == "disk-max") {
      flag.quota.disk_bytes_max = bytes;
    } else {
      return Invalid(text, absl::StrCat("there is no '", key, "'"));
    }
  }
  if (flag.tenant.empty() && flag.quota.pool_bytes_reserved > 0) {
    return Invalid(text,
                   "pool-reserved needs a tenant: nobody knows how many others there will be");
  }
  return flag;
}

absl::Status AddQuotaFlags(const std::vector<std::string>& texts, EngineOptions* options) {
  bool has_default = false;
  for (const std::string& text : texts) {
    absl::StatusOr<QuotaFlag> flag = ParseQuotaFlag(text);
    if (!flag.ok()) return flag.status();
    bool is_new = !has_default;
    if (flag->tenant.empty()) {
      has_default = true;
      options->quota_default = flag->quota;
    } else {
      is_new = options->tenant_quotas.emplace(flag->tenant, flag->quota).second;
    }
    if (!is_new) return Invalid(text, "there is one of the same tenant before it");
  }
  return CheckQuotas(*options);
}

}  // namespace kvservice
