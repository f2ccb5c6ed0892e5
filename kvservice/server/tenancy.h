// Whose connection it is. Without TLS it belongs to the listener's tenant; with TLS, to whom the
// client's certificate names. Never does a field of a message say. Any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_TENANCY_H_
#define KVSERVICE_KVSERVICE_SERVER_TENANCY_H_

#include <cstdint>
#include <memory>
#include <string>

#include "kvservice/server/access.h"

namespace grpc {
class AuthMetadataProcessor;
class ServerContext;
class ServerCredentials;
}  // namespace grpc

namespace kvservice {

// Credentials for a Unix socket or a loopback address: they verify that connections are local and
// mark each with the listener's tenant.
std::shared_ptr<grpc::ServerCredentials> LocalCredentials(bool is_unix, const std::string& tenant);

// For credentials that ask for client certificates: marks each connection with the end of its
// certificate's time.
std::shared_ptr<grpc::AuthMetadataProcessor> NewCertificateMark();

// The caller at the other end of a connection with one of those marks; without one, nobody.
Caller CallerOf(const grpc::ServerContext& context, const IdentityMap& identities,
                uint64_t wall_now_ns);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TENANCY_H_
