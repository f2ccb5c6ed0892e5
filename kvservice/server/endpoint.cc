#include "kvservice/server/endpoint.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <algorithm>
#include <charconv>

#include "absl/status/status.h"

namespace kvservice {
namespace {

constexpr std::string_view kUnixPrefix = "unix:";
constexpr std::string_view kTenantPrefix = "tenant=";
constexpr size_t kTenantBytesMax = 64;

absl::Status Invalid(std::string_view text, std::string_view problem) {
  return absl::InvalidArgumentError("'" + std::string(text) + "': " + std::string(problem));
}

absl::StatusOr<Endpoint> ParseUnix(std::string_view text, std::string_view path) {
  if (path.empty() || path.front() != '/') {
    return Invalid(text, "the path of a Unix socket must be absolute");
  }
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return Invalid(text, "the path of a Unix socket has at most 107 bytes");
  }
  Endpoint endpoint;
  endpoint.path = path;
  return endpoint;
}

bool IsNumericAddress(const std::string& host) {
  in6_addr address;
  return inet_pton(AF_INET, host.c_str(), &address) == 1 ||
         inet_pton(AF_INET6, host.c_str(), &address) == 1;
}

}  // namespace

std::string Endpoint::ToString() const {
  if (kind == Kind::kUnix) return std::string(kUnixPrefix) + path;
  const bool brackets = host.find(':') != std::string::npos;
  return (brackets ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

bool Endpoint::IsLocal() const {
  if (kind == Kind::kUnix) return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::StatusOr<Endpoint> ParseEndpoint(std::string_view text) {
  if (text.substr(0, kUnixPrefix.size()) == kUnixPrefix) {
    return ParseUnix(text, text.substr(kUnixPrefix.size()));
  }
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) {
    return Invalid(text, "expected unix:/path or HOST:PORT");
  }
  Endpoint endpoint;
  endpoint.kind = Endpoint::Kind::kTcp;
  std::string_view host = text.substr(0, colon);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  endpoint.host = host == "localhost" ? "127.0.0.1" : std::string(host);
  if (!IsNumericAddress(endpoint.host)) {
    return Invalid(text, "the host must be a numeric address or localhost");
  }
  const std::string_view port = text.substr(colon + 1);
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), endpoint.port);
  if (error != std::errc() || end != port.data() + port.size()) {
    return Invalid(text, "the port must be a number from 0 to 65535");
  }
  return endpoint;
}

absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view text) {
  ListenAddress address;
  std::string_view rest = text;
  if (rest.substr(0, kTenantPrefix.size()) == kTenantPrefix) {
    const size_t comma = rest.find(',');
    if (comma == std::string_view::npos) {
      return Invalid(text, "expected tenant=NAME,ENDPOINT");
    }
    address.tenant = rest.substr(kTenantPrefix.size(), comma - kTenantPrefix.size());
    rest = rest.substr(comma + 1);
    address.names_tenant = true;
  }
  if (!IsTenantName(address.tenant)) {
    return Invalid(text, "a tenant is 1 to 64 characters of [A-Za-z0-9_.-]");
  }
  absl::StatusOr<Endpoint> endpoint = ParseEndpoint(rest);
  if (!endpoint.ok()) return endpoint.status();
  address.endpoint = *std::move(endpoint);
  return address;
}

bool IsTenantName(std::string_view name) {
  return !name.empty() && name.size() <= kTenantBytesMax &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '_' || c == '.' || c == '-';
         });
}

}  // namespace kvservice
