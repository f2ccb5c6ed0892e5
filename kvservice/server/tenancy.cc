#include "kvservice/server/tenancy.h"

#include <grpcpp/security/auth_context.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_context.h>

#include <mutex>
#include <utility>
#include <vector>

#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr char kTenantProperty[] = "kvservice_tenant";

// Writes the listener's tenant into the connection's properties, with its first call. The
// properties are shared by all calls of the connection and not thread-safe: the lock makes the one
// write happen before every read.
class TenantMark final : public grpc::AuthMetadataProcessor {
 public:
  explicit TenantMark(std::string tenant) : tenant_(std::move(tenant)) {}
  bool IsBlocking() const override { return false; }
  grpc::Status Process(const InputMetadata& /*auth_metadata*/, grpc::AuthContext* context,
                       OutputMetadata* /*consumed_auth_metadata*/,
                       OutputMetadata* /*response_metadata*/) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (context->FindPropertyValues(kTenantProperty).empty()) {
      context->AddProperty(kTenantProperty, tenant_);
    }
    return grpc::Status::OK;
  }

 private:
  const std::string tenant_;
  std::mutex mutex_;
};

}  // namespace

std::shared_ptr<grpc::ServerCredentials> ListenerCredentials(const ListenAddress& address) {
  const bool is_unix = address.endpoint.kind == Endpoint::Kind::kUnix;
  std::shared_ptr<grpc::ServerCredentials> credentials =
      grpc::experimental::LocalServerCredentials(is_unix ? UDS : LOCAL_TCP);
  credentials->SetAuthMetadataProcessor(std::make_shared<TenantMark>(address.tenant));
  return credentials;
}

absl::StatusOr<std::string> TenantOf(const grpc::ServerContext& context) {
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  const std::vector<grpc::string_ref> tenants =
      auth == nullptr ? std::vector<grpc::string_ref>() : auth->FindPropertyValues(kTenantProperty);
  if (tenants.empty()) {
    return MakeError(absl::StatusCode::kUnauthenticated, "the connection belongs to no tenant",
                     {.reason = "TENANT_UNKNOWN", .field = {}, .metadata = {}});
  }
  return std::string(tenants.front().data(), tenants.front().size());
}

}  // namespace kvservice
