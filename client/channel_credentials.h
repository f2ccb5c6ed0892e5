// Credentials of channels: TLS with the client's certificate, or none. Inside the library only. Any
// thread.

#ifndef KVSERVICE_CLIENT_CHANNEL_CREDENTIALS_H_
#define KVSERVICE_CLIENT_CHANNEL_CREDENTIALS_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "client/options.h"

namespace grpc {
class ChannelArguments;
class ChannelCredentials;
}  // namespace grpc

namespace kvservice::client {

// INVALID_ARGUMENT / REQUEST_INVALID: TLS with a Unix socket, or a file that is missing or cannot
// be read ("tls.key_file").
absl::Status CheckTls(const std::string& endpoint, const std::optional<TlsOptions>& tls);

// Without `tls`: none, which servers accept on Unix sockets and loopback addresses alone.
std::shared_ptr<grpc::ChannelCredentials> ChannelCredentialsOf(
    const std::optional<TlsOptions>& tls);

void SetServerName(const std::optional<TlsOptions>& tls, grpc::ChannelArguments* arguments);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_CHANNEL_CREDENTIALS_H_
