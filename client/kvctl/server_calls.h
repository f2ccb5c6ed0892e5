// The calls that kvctl makes, as messages. The one file of kvctl that includes gRPC is
// server_calls.cc. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_SERVER_CALLS_H_
#define KVSERVICE_CLIENT_KVCTL_SERVER_CALLS_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/options.h"
#include "kvservice/v1/admin.pb.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::client {

enum class Health : uint8_t { kServing, kNotServing };

class ServerCalls {
 public:
  virtual ~ServerCalls() = default;

  // On the data side. NOT_FOUND for a service that the server does not know; "" = ready.
  virtual absl::StatusOr<Health> CheckHealth(const std::string& service) = 0;
  // All, ordered by name.
  virtual absl::StatusOr<std::vector<v1::Model>> ListModels() = 0;
  virtual absl::StatusOr<v1::GetModelResponse> GetModel(const std::string& name) = 0;
  virtual absl::StatusOr<v1::AuditResponse> Audit(const v1::AuditRequest& request) = 0;
  // As it is when they are called. The sequence afterwards.
  virtual absl::StatusOr<v1::Sequence> Suspend(const std::string& id) = 0;
  virtual absl::StatusOr<v1::Sequence> Resume(const std::string& id) = 0;
  // The request's generation is filled in.
  virtual absl::StatusOr<v1::TransferResponse> Transfer(v1::TransferRequest request) = 0;

  // `request` without its handle.
  virtual absl::StatusOr<v1::Sequence> Fork(const std::string& id, v1::ForkRequest request) = 0;

  // On the admin side.
  virtual absl::StatusOr<v1::GetServerInfoResponse> GetServerInfo() = 0;
  virtual absl::StatusOr<v1::GetStatsResponse> GetStats() = 0;
  // The first `limit`, ordered by id. `more` tells whether there are others.
  virtual absl::StatusOr<std::vector<v1::Sequence>> ListSequences(const std::string& tenant,
                                                                  size_t limit, bool* more) = 0;
  virtual absl::StatusOr<v1::Sequence> DescribeSequence(const std::string& id) = 0;
  virtual absl::StatusOr<v1::DescribeBlockResponse> DescribeBlock(
      const v1::DescribeBlockRequest& request) = 0;
  virtual absl::StatusOr<v1::ExplainResponse> Explain(const v1::ExplainRequest& request) = 0;
  virtual absl::StatusOr<v1::EvictResponse> Evict(const v1::EvictRequest& request) = 0;
  // The first `limit` tenants, ordered by name, or the one alone.
  virtual absl::StatusOr<std::vector<v1::TenantUsage>> ListTenants(const std::string& tenant,
                                                                   size_t limit, bool* more) = 0;
  virtual absl::StatusOr<v1::SetQuotaResponse> SetQuota(const v1::SetQuotaRequest& request) = 0;
  virtual absl::StatusOr<v1::VerifyStoreResponse> VerifyStore() = 0;
  virtual absl::Status Drain(uint32_t grace_ms) = 0;
};

// Connects lazily, with `tls` to HOST:PORT and without to Unix sockets; all calls together get
// `timeout`, counted from here. Nothing is repeated: the person or script that runs kvctl decides.
std::unique_ptr<ServerCalls> NewServerCalls(const std::string& endpoint,
                                            const std::string& admin_endpoint,
                                            const std::optional<TlsOptions>& tls,
                                            std::chrono::milliseconds timeout);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_SERVER_CALLS_H_
