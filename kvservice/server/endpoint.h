// Addresses that the server listens on. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_ENDPOINT_H_
#define KVSERVICE_KVSERVICE_SERVER_ENDPOINT_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvservice {

struct Endpoint {
  enum class Kind : uint8_t { kUnix, kTcp };
  Kind kind = Kind::kUnix;
  // kUnix: absolute path of the socket, at most 107 bytes.
  std::string path;
  // Of the socket's file when it is listened on: who may connect.
  uint32_t socket_mode = 0600;
  // kTcp: a numeric IPv4 or IPv6 address; port 0 lets the system choose.
  std::string host;
  uint16_t port = 0;

  // What a client dials: "unix:/run/kvservice.sock", "127.0.0.1:50051", "[::1]:50051".
  std::string ToString() const;
  // Nobody outside this host can reach it: a Unix socket or a loopback address. Only these may be
  // served without TLS.
  bool IsLocal() const;
};

// "unix:/absolute/path", "HOST:PORT" or "[HOST]:PORT" with a numeric host or "localhost".
// INVALID_ARGUMENT says what is wrong with `text`.
absl::StatusOr<Endpoint> ParseEndpoint(std::string_view text);

// An endpoint and the tenant whom every connection to it belongs to.
struct ListenAddress {
  static constexpr char kDefaultTenant[] = "default";
  // Of listeners without TLS; with TLS the tenant follows from the client's certificate.
  std::string tenant = kDefaultTenant;
  Endpoint endpoint;
  // The tenant was spelt out.
  bool names_tenant = false;
};

// "[tenant=NAME,]ENDPOINT".
absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view text);

// 1 to 64 characters of [A-Za-z0-9_.-].
bool IsTenantName(std::string_view name);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ENDPOINT_H_
