#include "kvservice/server/tenancy.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_context.h>

#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "kvservice/server/tls.h"

namespace kvservice {
namespace {

constexpr char kTenantProperty[] = "kvservice_tenant";
constexpr char kNotAfterProperty[] = "kvservice_not_after_ns";

// The one value of a property; empty when there is none or there are several.
std::string OnlyValue(const grpc::AuthContext& context, const char* property) {
  const std::vector<grpc::string_ref> values = context.FindPropertyValues(property);
  if (values.size() != 1) return "";
  return {values.front().data(), values.front().size()};
}

// Writes a property of the connection, with its first call. The properties are shared by all calls
// of the connection and not thread-safe: the lock makes the one write happen before every read.
class ConnectionMark final : public grpc::AuthMetadataProcessor {
 public:
  using Value = std::function<std::string(const grpc::AuthContext& context)>;
  ConnectionMark(const char* property, Value value)
      : property_(property), value_(std::move(value)) {}
  bool IsBlocking() const override { return false; }
  grpc::Status Process(const InputMetadata& /*auth_metadata*/, grpc::AuthContext* context,
                       OutputMetadata* /*consumed_auth_metadata*/,
                       OutputMetadata* /*response_metadata*/) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (context->FindPropertyValues(property_).empty()) {
      context->AddProperty(property_, value_(*context));
    }
    return grpc::Status::OK;
  }

 private:
  const char* const property_;
  const Value value_;
  std::mutex mutex_;
};

}  // namespace

std::shared_ptr<grpc::ServerCredentials> LocalCredentials(bool is_unix, const std::string& tenant) {
  std::shared_ptr<grpc::ServerCredentials> credentials =
      grpc::experimental::LocalServerCredentials(is_unix ? UDS : LOCAL_TCP);
  credentials->SetAuthMetadataProcessor(std::make_shared<ConnectionMark>(
      kTenantProperty, [tenant](const grpc::AuthContext& /*context*/) { return tenant; }));
  return credentials;
}

std::shared_ptr<grpc::AuthMetadataProcessor> NewCertificateMark() {
  return std::make_shared<ConnectionMark>(kNotAfterProperty, [](const grpc::AuthContext& context) {
    return std::to_string(NotAfterNs(OnlyValue(context, GRPC_X509_PEM_CERT_PROPERTY_NAME)));
  });
}

Caller CallerOf(const grpc::ServerContext& context, const IdentityMap& identities,
                uint64_t wall_now_ns) {
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth == nullptr) return {};
  std::string tenant = OnlyValue(*auth, kTenantProperty);
  if (!tenant.empty()) return LocalCaller(std::move(tenant));
  const std::string not_after_ns = OnlyValue(*auth, kNotAfterProperty);
  if (not_after_ns.empty()) return {};
  Caller caller;
  caller.identity = OnlyValue(*auth, GRPC_PEER_URI_PROPERTY_NAME);
  caller.is_expired = std::stoull(not_after_ns) <= wall_now_ns;
  caller.peer = context.peer();
  identities.Resolve(&caller);
  return caller;
}

}  // namespace kvservice
