// Whose call it is. The tenant follows from the connection a call came on, never from a field of a
// message. Any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_TENANCY_H_
#define KVSERVICE_KVSERVICE_SERVER_TENANCY_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvservice/server/endpoint.h"

namespace grpc {
class ServerContext;
class ServerCredentials;
}  // namespace grpc

namespace kvservice {

// Credentials for a local listener: they verify that connections are local and mark each with the
// listener's tenant.
std::shared_ptr<grpc::ServerCredentials> ListenerCredentials(const ListenAddress& address);

// The tenant of a call; UNAUTHENTICATED / TENANT_UNKNOWN when its connection has none.
absl::StatusOr<std::string> TenantOf(const grpc::ServerContext& context);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TENANCY_H_
