// Certificates made on the spot: authorities, what they sign, and what nobody should believe.

#ifndef KVSERVICE_TESTS_SERVER_CERTIFICATES_H_
#define KVSERVICE_TESTS_SERVER_CERTIFICATES_H_

#include <openssl/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvservice/server/endpoint.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace kvservice::testing {

// A certificate and its key, in PEM.
struct Credential {
  std::string certificate;
  std::string key;
};

struct CertificateSpec {
  // Subject alternative names in OpenSSL's form: "URI:spiffe://example.org/worker", "DNS:server",
  // "IP:127.0.0.1".
  std::vector<std::string> names;
  // "clientAuth", "serverAuth"; empty = for anything.
  std::string purpose = "clientAuth";
  // In seconds from now.
  long begins_s = -3600;
  long ends_s = 3600;
  std::string common_name = "someone";
};

class Authority {
 public:
  explicit Authority(const std::string& name);
  ~Authority();
  Authority(const Authority&) = delete;
  Authority& operator=(const Authority&) = delete;

  const std::string& pem() const { return pem_; }
  Credential Issue(const CertificateSpec& spec) const;

 private:
  X509* certificate_ = nullptr;
  EVP_PKEY* key_ = nullptr;
  std::string pem_;
};

// Signed by its own key.
Credential SelfSigned(const CertificateSpec& spec);

// Writes a file with mode 0600.
void WritePrivate(const std::string& path, const std::string& text);

// A new connection to a server that must have the name "localhost" and a certificate of the
// authority `ca`; without a credential the client shows none.
std::shared_ptr<grpc::Channel> ConnectTls(const Endpoint& endpoint, const std::string& ca,
                                          const std::optional<Credential>& credential);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_CERTIFICATES_H_
