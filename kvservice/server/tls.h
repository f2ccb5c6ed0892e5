// TLS of listeners that other hosts may reach: the server shows a certificate and asks for one. Any
// thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_TLS_H_
#define KVSERVICE_KVSERVICE_SERVER_TLS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"

namespace grpc {
class ServerCredentials;
}  // namespace grpc

namespace kvservice {

// PEM files. All three are looked at again every `reload_s` seconds, so that new certificates come
// into force without a restart; files that make no sense then are passed over.
struct TlsFiles {
  // The server's certificate, and those between it and its authority.
  std::string certificate;
  // Readable by its owner and at most its group, writable by the owner alone.
  std::string key;
  // Authorities that sign clients' certificates.
  std::string client_ca;
  uint32_t reload_s = 60;

  bool operator==(const TlsFiles&) const = default;
};

// INVALID_ARGUMENT with the flag whose file cannot be read, is not PEM, does not fit the others, or
// whose mode is too generous.
absl::Status CheckTlsFiles(const TlsFiles& files);

// Credentials that accept TLS 1.2 and 1.3, with client certificates that one of the authorities has
// signed for that purpose, and nothing else. They mark connections (kvservice/server/tenancy.h).
std::shared_ptr<grpc::ServerCredentials> NewTlsCredentials(const TlsFiles& files);

// End of a certificate's time in nanoseconds since 1970; 0 when `pem` is none.
uint64_t NotAfterNs(const std::string& pem);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TLS_H_
