// What a server with TLS needs, in a folder: its certificate for "localhost", its authority, and
// identities.

#ifndef KVSERVICE_TESTS_SERVER_SERVED_TLS_H_
#define KVSERVICE_TESTS_SERVER_SERVED_TLS_H_

#include <memory>
#include <optional>
#include <string>

#include "kvservice/server/access.h"
#include "kvservice/server/tls.h"
#include "tests/server/certificates.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {

// Certificates that end up in files of the folder: "ca", "cert" and "key" of the server.
TlsFiles WriteServerFiles(const Authority& authority, const std::string& folder);

// A server whose data and admin sides are TCP addresses with TLS, besides the Unix sockets of the
// data side. Knows identities of the tenants "default" and "acme" with one role each.
ServedEngineOptions WithTls(const Authority& authority, const std::string& folder);

// "spiffe://example.org/" and `who`: "default/worker", "acme/admin".
std::string UriOf(const std::string& who);
// Of a client with that URI.
CertificateSpec SpecOf(const std::string& who);
// Writes PREFIX.pem and PREFIX.key for a client.
void WriteClientFiles(const Authority& authority, const std::string& who,
                      const std::string& prefix);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_SERVED_TLS_H_
