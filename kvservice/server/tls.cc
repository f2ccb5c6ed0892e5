#include "kvservice/server/tls.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>

#include "kvservice/error.h"
#include "kvservice/server/tenancy.h"

namespace kvservice {
namespace {

constexpr char kCertificateFlag[] = "--tls-cert";
constexpr char kKeyFlag[] = "--tls-key";
constexpr char kClientCaFlag[] = "--tls-client-ca";
constexpr uint64_t kNsPerSecond = 1'000'000'000;

template <auto kFree>
struct FreeWith {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Certificate = std::unique_ptr<X509, FreeWith<X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, FreeWith<EVP_PKEY_free>>;
using Bio = std::unique_ptr<BIO, FreeWith<BIO_free>>;

absl::Status Wrong(const char* flag, const std::string& path, const std::string& problem) {
  // What OpenSSL has noted about it is not for later calls.
  ERR_clear_error();
  return InvalidField(flag, "TLS_FILE_INVALID", std::string(flag) + ": " + path + " " + problem);
}

absl::Status CannotRead(const char* flag, const std::string& path) {
  return Wrong(flag, path, std::string("cannot be read: ") + std::strerror(errno));
}

Certificate ReadCertificate(BIO* bio) {
  return Certificate(PEM_read_bio_X509(bio, nullptr, nullptr, nullptr));
}

// Nobody is there to type a passphrase.
int NoPassphrase(char* /*buffer*/, int /*bytes*/, int /*writes*/, void* /*context*/) { return 0; }

absl::Status CheckKeyMode(const std::string& path) {
  struct stat facts = {};
  if (stat(path.c_str(), &facts) != 0) return CannotRead(kKeyFlag, path);
  constexpr mode_t kTooMuch = S_IWGRP | S_IXGRP | S_IRWXO;
  if (S_ISREG(facts.st_mode) && (facts.st_mode & kTooMuch) == 0) return absl::OkStatus();
  return Wrong(kKeyFlag, path, "must be a file that others cannot read: mode 0600 or 0640");
}

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files) {
  const Bio certificate_bio(BIO_new_file(files.certificate.c_str(), "r"));
  if (certificate_bio == nullptr) return CannotRead(kCertificateFlag, files.certificate);
  const Certificate certificate = ReadCertificate(certificate_bio.get());
  if (certificate == nullptr) {
    return Wrong(kCertificateFlag, files.certificate, "does not begin with a PEM certificate");
  }
  if (absl::Status mode = CheckKeyMode(files.key); !mode.ok()) return mode;
  const Bio key_bio(BIO_new_file(files.key.c_str(), "r"));
  if (key_bio == nullptr) return CannotRead(kKeyFlag, files.key);
  const Key key(PEM_read_bio_PrivateKey(key_bio.get(), nullptr, NoPassphrase, nullptr));
  if (key == nullptr) return Wrong(kKeyFlag, files.key, "has no PEM key without a passphrase");
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    return Wrong(kKeyFlag, files.key, "is not the key of " + files.certificate);
  }
  const Bio ca_bio(BIO_new_file(files.client_ca.c_str(), "r"));
  if (ca_bio == nullptr) return CannotRead(kClientCaFlag, files.client_ca);
  if (ReadCertificate(ca_bio.get()) == nullptr) {
    return Wrong(kClientCaFlag, files.client_ca, "does not begin with a PEM certificate");
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::ServerCredentials> NewTlsCredentials(const TlsFiles& files) {
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
          files.key, files.certificate, files.client_ca, files.reload_s));
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  std::shared_ptr<grpc::ServerCredentials> credentials =
      grpc::experimental::TlsServerCredentials(options);
  credentials->SetAuthMetadataProcessor(NewCertificateMark());
  return credentials;
}

uint64_t NotAfterNs(const std::string& pem) {
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  const Certificate certificate = bio == nullptr ? nullptr : ReadCertificate(bio.get());
  std::tm end = {};
  if (certificate == nullptr || ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &end) != 1) {
    ERR_clear_error();
    return 0;
  }
  const std::time_t seconds = timegm(&end);
  // Beyond what fits lie centuries.
  if (seconds <= 0) return 0;
  const auto after = static_cast<uint64_t>(seconds);
  return after > UINT64_MAX / kNsPerSecond ? UINT64_MAX : after * kNsPerSecond;
}

}  // namespace kvservice
