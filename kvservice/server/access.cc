#include "kvservice/server/access.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/v1/access.pb.h"

namespace kvservice {
namespace {

constexpr size_t kFileBytesMax = size_t{1} << 20;
constexpr size_t kUriBytesMax = 2048;
constexpr char kLocalIdentity[] = "local";
constexpr std::string_view kPackage = "kvservice.v1.";

constexpr std::pair<Role, const char*> kRoleNames[] = {{Role::kWorker, "worker"},
                                                       {Role::kPrefill, "prefill"},
                                                       {Role::kReader, "reader"},
                                                       {Role::kAdmin, "admin"}};

constexpr std::array<std::string_view, 5> kDenials = {"IDENTITY_MISSING", "CERTIFICATE_EXPIRED",
                                                      "IDENTITY_UNKNOWN", "ROLE_MISSING",
                                                      "PEER_NOT_ALLOWED"};

absl::Status Denied(absl::StatusCode code, const std::string& message, const char* reason,
                    const MethodAccess& method) {
  return MakeError(code, message,
                   {.reason = reason, .field = {}, .metadata = {{"method", method.name}}});
}

template <typename Values>
RoleSet RolesOf(const Values& values) {
  RoleSet roles;
  for (const int value : values) {
    if (value >= v1::ROLE_WORKER && value <= v1::ROLE_ADMIN) roles.Add(static_cast<Role>(value));
  }
  return roles;
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

absl::Status Invalid(const std::string& problem) { return absl::InvalidArgumentError(problem); }

}  // namespace

std::string RoleSet::ToString() const {
  std::string text;
  for (const auto& [role, name] : kRoleNames) {
    if (!Has(role)) continue;
    if (!text.empty()) text += " or ";
    text += name;
  }
  return text.empty() ? "none" : text;
}

Caller LocalCaller(std::string tenant) {
  return {.identity = kLocalIdentity,
          .tenant = std::move(tenant),
          .roles = kAllRoles,
          .is_expired = false,
          .peer = {}};
}

MethodAccess AccessOf(std::string_view full_name) {
  MethodAccess access;
  access.name = full_name;
  if (full_name.substr(0, kPackage.size()) == kPackage) access.name.erase(0, kPackage.size());
  const google::protobuf::MethodDescriptor* const method =
      google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(std::string(full_name));
  if (method != nullptr)
    access.any_of = RolesOf(method->options().GetExtension(v1::access).any_of());
  return access;
}

absl::Status CheckAccess(const MethodAccess& method, const Caller& caller) {
  if (caller.identity.empty()) {
    return Denied(absl::StatusCode::kUnauthenticated,
                  "the client's certificate does not have exactly one URI among its names",
                  "IDENTITY_MISSING", method);
  }
  if (caller.is_expired) {
    return Denied(absl::StatusCode::kUnauthenticated, "the client's certificate has expired",
                  "CERTIFICATE_EXPIRED", method);
  }
  if (caller.tenant.empty()) {
    return Denied(absl::StatusCode::kPermissionDenied,
                  "the URI of the client's certificate is not known here", "IDENTITY_UNKNOWN",
                  method);
  }
  if (method.is_for_all || caller.roles.Shares(method.any_of)) return absl::OkStatus();
  return Denied(absl::StatusCode::kPermissionDenied,
                absl::StrCat(method.name, " needs the role ", method.any_of.ToString()),
                "ROLE_MISSING", method);
}

bool IsDenial(const absl::Status& status) {
  if (!absl::IsUnauthenticated(status) && !absl::IsPermissionDenied(status)) return false;
  const std::string reason = DetailsOf(status).reason;
  return std::find(kDenials.begin(), kDenials.end(), reason) != kDenials.end();
}

absl::Status IdentityMap::Add(std::string_view text) {
  // One object is read as a list of one.
  const size_t first = text.find_first_not_of(" \t\r\n");
  const bool is_list = first != std::string_view::npos && text[first] == '[';
  const std::string wrapped = absl::StrCat("{\"identities\": ", is_list ? "" : "[",
                                           std::string(text), is_list ? "}" : "]}");
  v1::Identities read;
  const auto parsed = google::protobuf::util::JsonStringToMessage(wrapped, &read);
  if (!parsed.ok()) return Invalid(OneLine(parsed.message().ToString()));
  if (read.identities_size() == 0) return Invalid("there is no identity in it");
  for (int i = 0; i < read.identities_size(); ++i) {
    const v1::Identity& entry = read.identities(i);
    const bool names_all = std::all_of(entry.roles().begin(), entry.roles().end(), [](int role) {
      return role >= v1::ROLE_WORKER && role <= v1::ROLE_ADMIN;
    });
    const absl::Status status = names_all
                                    ? AddOne(entry.uri(), entry.tenant(), RolesOf(entry.roles()))
                                    : Invalid("roles has one that is none");
    if (!status.ok()) return Invalid(absl::StrCat("[", i, "]: ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status IdentityMap::AddOne(const std::string& uri, const std::string& tenant, RoleSet roles) {
  if (entries_.size() >= kIdentitiesMax) {
    return Invalid(absl::StrCat("there are more than ", kIdentitiesMax));
  }
  if (uri.empty() || uri.size() > kUriBytesMax || uri.find(':') == std::string::npos) {
    return Invalid(absl::StrCat("uri must be a URI of at most ", kUriBytesMax, " bytes"));
  }
  if (!IsTenantName(tenant)) {
    return Invalid("tenant must be 1 to 64 characters of [A-Za-z0-9_.-]");
  }
  if (roles.empty()) return Invalid("roles must name at least one");
  if (!entries_.emplace(uri, Entry{.tenant = tenant, .roles = roles}).second) {
    return Invalid("uri is there twice");
  }
  return absl::OkStatus();
}

absl::Status IdentityMap::AddFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  // One byte more than there may be tells a longer file.
  std::string text(kFileBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) {
    return Invalid(absl::StrCat(path, ": has more than ", kFileBytesMax, " bytes"));
  }
  const absl::Status status = Add(text);
  return status.ok() ? status : Invalid(absl::StrCat(path, ": ", status.message()));
}

void IdentityMap::Resolve(Caller* caller) const {
  const auto found = entries_.find(caller->identity);
  if (found == entries_.end()) return;
  caller->tenant = found->second.tenant;
  caller->roles = found->second.roles;
}

}  // namespace kvservice
