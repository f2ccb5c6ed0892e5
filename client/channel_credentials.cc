#include "client/channel_credentials.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/support/channel_arguments.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "client/error.h"

namespace kvservice::client {
namespace {

constexpr unsigned kReloadSeconds = 60;
constexpr char kUnixPrefix[] = "unix:";

}  // namespace

absl::Status CheckTls(const std::string& endpoint, const std::optional<TlsOptions>& tls) {
  if (!tls.has_value()) return absl::OkStatus();
  if (endpoint.rfind(kUnixPrefix, 0) == 0) {
    return InvalidRequest("tls", "is for HOST:PORT: Unix sockets have none");
  }
  const std::pair<const char*, const std::string*> files[] = {
      {"tls.ca_file", &tls->ca_file},
      {"tls.certificate_file", &tls->certificate_file},
      {"tls.key_file", &tls->key_file}};
  for (const auto& [field, path] : files) {
    if (path->empty()) return InvalidRequest(field, "is missing");
    if (access(path->c_str(), R_OK) != 0) {
      return InvalidRequest(field, "cannot be read: " + *path + ": " + std::strerror(errno));
    }
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::ChannelCredentials> ChannelCredentialsOf(
    const std::optional<TlsOptions>& tls) {
  if (!tls.has_value()) return grpc::InsecureChannelCredentials();
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
          tls->key_file, tls->certificate_file, tls->ca_file, kReloadSeconds));
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

void SetServerName(const std::optional<TlsOptions>& tls, grpc::ChannelArguments* arguments) {
  if (tls.has_value() && !tls->server_name.empty()) {
    arguments->SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, tls->server_name);
  }
}

}  // namespace kvservice::client
