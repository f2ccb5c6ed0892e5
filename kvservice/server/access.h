// Who calls, and what that one may do. Roles come from the connection (a certificate, or being on
// this host), never from a field of a message; what a method asks for stands beside it in the
// proto files. Pure functions and plain data; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_ACCESS_H_
#define KVSERVICE_KVSERVICE_SERVER_ACCESS_H_

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvservice {

// The values are those of v1::Role.
enum class Role : uint8_t { kWorker = 1, kPrefill = 2, kReader = 3, kAdmin = 4 };

class RoleSet {
 public:
  constexpr RoleSet() = default;
  constexpr RoleSet(std::initializer_list<Role> roles) {
    for (const Role role : roles) Add(role);
  }
  constexpr void Add(Role role) { bits_ |= 1U << static_cast<unsigned>(role); }
  constexpr bool Has(Role role) const { return (bits_ >> static_cast<unsigned>(role) & 1U) != 0; }
  constexpr bool Shares(RoleSet other) const { return (bits_ & other.bits_) != 0; }
  constexpr bool empty() const { return bits_ == 0; }
  constexpr bool operator==(const RoleSet&) const = default;
  // "worker or prefill".
  std::string ToString() const;

 private:
  uint32_t bits_ = 0;
};

inline constexpr RoleSet kAllRoles = {Role::kWorker, Role::kPrefill, Role::kReader, Role::kAdmin};

// One at the other end of a connection.
struct Caller {
  // "local" for processes on this host, else the URI of the certificate; empty when it has none, or
  // more than one.
  std::string identity = {};
  // Empty when the identity is mapped to none.
  std::string tenant = {};
  RoleSet roles = {};
  // The certificate's time is over: the connection outlived it.
  bool is_expired = false;
  // Address of the other end, for the access log; empty for local callers.
  std::string peer = {};
};

// A process on this host, at a listener of `tenant`.
Caller LocalCaller(std::string tenant);

// What a method asks of its callers.
struct MethodAccess {
  // "SequenceService.Create".
  std::string name;
  // One of them is needed; none = nobody may call it.
  RoleSet any_of = {};
  // Any known caller will do: health.
  bool is_for_all = false;
};

// As the proto files say. `full_name` is "kvservice.v1.SequenceService.Create"; for a method that
// does not exist, any_of is empty.
MethodAccess AccessOf(std::string_view full_name);

// OK, or why the caller is turned away, whatever the call is about: UNAUTHENTICATED /
// IDENTITY_MISSING or CERTIFICATE_EXPIRED, PERMISSION_DENIED / IDENTITY_UNKNOWN or ROLE_MISSING.
absl::Status CheckAccess(const MethodAccess& method, const Caller& caller);
// The error was made by CheckAccess, or by a lane's own check of its peer.
bool IsDenial(const absl::Status& status);

// Which certificates belong to whom. Constant once filled.
class IdentityMap {
 public:
  static constexpr size_t kIdentitiesMax = 10'000;

  // INVALID_ARGUMENT, naming the entry and the field, for text that is no JSON image of a list of
  // v1::Identity: fields that do not exist, no URI, one that is there already, a tenant that is
  // none, no roles, more than kIdentitiesMax. `text` may be one object instead of a list.
  absl::Status Add(std::string_view text);
  // The same for a file of at most a MiB. Also NOT_FOUND; all messages start with the path.
  absl::Status AddFile(const std::string& path);

  // Sets tenant and roles of a caller whose identity is known; leaves others alone.
  void Resolve(Caller* caller) const;
  bool empty() const { return entries_.empty(); }

 private:
  struct Entry {
    std::string tenant;
    RoleSet roles;
  };
  absl::Status AddOne(const std::string& uri, const std::string& tenant, RoleSet roles);

  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ACCESS_H_
