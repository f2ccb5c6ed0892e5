#include "tests/server/certificates.h"

#include <fcntl.h>
#include <grpc/grpc_security_constants.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <gtest/gtest.h>
#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include "kvservice/server/transport.h"

namespace kvservice::testing {
namespace {

template <typename Write>
std::string Pem(Write write) {
  BIO* const bio = BIO_new(BIO_s_mem());
  EXPECT_EQ(write(bio), 1);
  char* bytes = nullptr;
  const long count = BIO_get_mem_data(bio, &bytes);
  std::string text(bytes, static_cast<size_t>(count));
  BIO_free(bio);
  return text;
}

std::string PemOf(X509* certificate) {
  return Pem([certificate](BIO* bio) { return PEM_write_bio_X509(bio, certificate); });
}

std::string PemOf(EVP_PKEY* key) {
  return Pem([key](BIO* bio) {
    return PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  });
}

EVP_PKEY* NewKey() {
  EVP_PKEY* const key = EVP_EC_gen("P-256");
  EXPECT_NE(key, nullptr);
  return key;
}

void AddExtension(X509* certificate, int kind, const std::string& value) {
  X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, nullptr, kind, value.c_str());
  EXPECT_NE(extension, nullptr) << value;
  EXPECT_EQ(X509_add_ext(certificate, extension, -1), 1);
  X509_EXTENSION_free(extension);
}

// Unsigned, for the key.
X509* NewCertificate(const std::string& name, EVP_PKEY* key, long begins_s, long ends_s) {
  X509* const certificate = X509_new();
  X509_set_version(certificate, X509_VERSION_3);
  uint32_t serial = 0;
  EXPECT_EQ(RAND_bytes(reinterpret_cast<unsigned char*>(&serial), sizeof(serial)), 1);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate), static_cast<long>(serial >> 1) + 1);
  X509_gmtime_adj(X509_getm_notBefore(certificate), begins_s);
  X509_gmtime_adj(X509_getm_notAfter(certificate), ends_s);
  X509_set_pubkey(certificate, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

// `issuer` is nullptr for one that signs itself.
Credential Make(const CertificateSpec& spec, X509* issuer, EVP_PKEY* issuer_key) {
  EVP_PKEY* const key = NewKey();
  X509* const certificate = NewCertificate(spec.common_name, key, spec.begins_s, spec.ends_s);
  X509_set_issuer_name(certificate,
                       X509_get_subject_name(issuer == nullptr ? certificate : issuer));
  std::string names;
  for (const std::string& name : spec.names) names += (names.empty() ? "" : ",") + name;
  if (!names.empty()) AddExtension(certificate, NID_subject_alt_name, names);
  if (!spec.purpose.empty()) AddExtension(certificate, NID_ext_key_usage, spec.purpose);
  EXPECT_GT(X509_sign(certificate, issuer == nullptr ? key : issuer_key, EVP_sha256()), 0);
  Credential credential = {.certificate = PemOf(certificate), .key = PemOf(key)};
  X509_free(certificate);
  EVP_PKEY_free(key);
  return credential;
}

}  // namespace

Authority::Authority(const std::string& name) : key_(NewKey()) {
  certificate_ = NewCertificate(name, key_, -86'400, 86'400);
  X509_set_issuer_name(certificate_, X509_get_subject_name(certificate_));
  AddExtension(certificate_, NID_basic_constraints, "critical,CA:TRUE");
  EXPECT_GT(X509_sign(certificate_, key_, EVP_sha256()), 0);
  pem_ = PemOf(certificate_);
}

Authority::~Authority() {
  X509_free(certificate_);
  EVP_PKEY_free(key_);
}

Credential Authority::Issue(const CertificateSpec& spec) const {
  return Make(spec, certificate_, key_);
}

Credential SelfSigned(const CertificateSpec& spec) { return Make(spec, nullptr, nullptr); }

void WritePrivate(const std::string& path, const std::string& text) {
  // Renamed into place: whoever looks at the file sees all of it.
  const std::string partial = path + ".partial";
  {
    const FileDescriptor file(open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
    ASSERT_EQ(write(file.get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  ASSERT_EQ(rename(partial.c_str(), path.c_str()), 0);
}

std::shared_ptr<grpc::Channel> ConnectTls(const Endpoint& endpoint, const std::string& ca,
                                          const std::optional<Credential>& credential) {
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = ca;
  if (credential.has_value()) {
    options.pem_cert_chain = credential->certificate;
    options.pem_private_key = credential->key;
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, "localhost");
  return grpc::CreateCustomChannel(endpoint.ToString(), grpc::SslCredentials(options), arguments);
}

}  // namespace kvservice::testing
