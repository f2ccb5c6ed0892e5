#include "client/kvctl/server_calls.h"

#include <google/protobuf/wrappers.pb.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>

#include "client/channel_credentials.h"
#include "client/error.h"
#include "kvservice/v1/admin.grpc.pb.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/model.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"

namespace kvservice::client {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr int32_t kPageSize = 1000;
// grpc.health.v1 HealthCheckResponse.ServingStatus.
constexpr int32_t kServing = 1;

// grpc.health.v1 is not packaged for C++, but its messages are one field each, with the number and
// type that these have: HealthCheckRequest{string 1}, HealthCheckResponse{enum 1}.
using HealthCheckRequest = google::protobuf::StringValue;
using HealthCheckResponse = google::protobuf::Int32Value;
constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";

absl::Status ToStatus(const grpc::Status& status) {
  return StatusFromWire(status.error_code(), status.error_message(), status.error_details());
}

std::shared_ptr<grpc::Channel> NewChannel(const std::string& endpoint,
                                          const std::optional<TlsOptions>& tls) {
  const bool is_unix = endpoint.rfind(kUnixPrefix, 0) == 0;
  const std::optional<TlsOptions> used = is_unix ? std::nullopt : tls;
  grpc::ChannelArguments arguments;
  SetServerName(used, &arguments);
  return grpc::CreateCustomChannel(endpoint, ChannelCredentialsOf(used), arguments);
}

class GrpcServerCalls final : public ServerCalls {
 public:
  GrpcServerCalls(const std::string& endpoint, const std::string& admin_endpoint,
                  const std::optional<TlsOptions>& tls, std::chrono::milliseconds timeout)
      : end_(std::chrono::system_clock::now() + timeout),
        data_(NewChannel(endpoint, tls)),
        models_(v1::ModelService::NewStub(data_)),
        attention_(v1::AttentionService::NewStub(data_)),
        sequences_(v1::SequenceService::NewStub(data_)),
        admin_(v1::AdminService::NewStub(NewChannel(admin_endpoint, tls))) {}

  absl::StatusOr<Health> CheckHealth(const std::string& service) override {
    HealthCheckRequest request;
    request.set_value(service);
    HealthCheckResponse response;
    grpc::ClientContext context;
    context.set_deadline(end_);
    grpc::TemplatedGenericStub<HealthCheckRequest, HealthCheckResponse> stub(data_);
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareUnaryCall(&context, kHealthCheck, request, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&response, &status, nullptr);
    // The call's deadline bounds the wait.
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    queue.Shutdown();
    if (!status.ok()) return ToStatus(status);
    return response.value() == kServing ? Health::kServing : Health::kNotServing;
  }

  absl::StatusOr<std::vector<v1::Model>> ListModels() override {
    std::vector<v1::Model> models;
    v1::ListModelsRequest request;
    request.set_page_size(kPageSize);
    for (;;) {
      auto page = Call<v1::ListModelsResponse>(models_, &v1::ModelService::Stub::List, request);
      if (!page.ok()) return page.status();
      for (v1::Model& model : *page->mutable_models()) models.push_back(std::move(model));
      if (page->next_page_token().empty()) return models;
      request.set_page_token(page->next_page_token());
    }
  }

  absl::StatusOr<v1::GetModelResponse> GetModel(const std::string& name) override {
    v1::GetModelRequest request;
    request.set_name(name);
    return Call<v1::GetModelResponse>(models_, &v1::ModelService::Stub::Get, request);
  }

  absl::StatusOr<v1::AuditResponse> Audit(const v1::AuditRequest& request) override {
    return Call<v1::AuditResponse>(attention_, &v1::AttentionService::Stub::Audit, request);
  }

  absl::StatusOr<v1::Sequence> Suspend(const std::string& id) override {
    return OnSequence<v1::SuspendRequest, v1::SuspendResponse>(&v1::SequenceService::Stub::Suspend,
                                                               id);
  }
  absl::StatusOr<v1::Sequence> Resume(const std::string& id) override {
    return OnSequence<v1::ResumeRequest, v1::ResumeResponse>(&v1::SequenceService::Stub::Resume,
                                                             id);
  }

  absl::StatusOr<v1::TransferResponse> Transfer(v1::TransferRequest request) override {
    const auto found = Get(request.handle().id());
    if (!found.ok()) return found.status();
    *request.mutable_handle() = found->sequence().handle();
    return Call<v1::TransferResponse>(sequences_, &v1::SequenceService::Stub::Transfer, request);
  }

  absl::StatusOr<v1::Sequence> Fork(const std::string& id, v1::ForkRequest request) override {
    return OnSequence<v1::ForkRequest, v1::ForkResponse>(&v1::SequenceService::Stub::Fork, id,
                                                         std::move(request));
  }

  absl::StatusOr<v1::GetServerInfoResponse> GetServerInfo() override {
    return Call<v1::GetServerInfoResponse>(admin_, &v1::AdminService::Stub::GetServerInfo,
                                           v1::GetServerInfoRequest());
  }

  absl::StatusOr<v1::GetStatsResponse> GetStats() override {
    return Call<v1::GetStatsResponse>(admin_, &v1::AdminService::Stub::GetStats,
                                      v1::GetStatsRequest());
  }

  absl::StatusOr<std::vector<v1::Sequence>> ListSequences(const std::string& tenant, size_t limit,
                                                          bool* more) override {
    std::vector<v1::Sequence> sequences;
    v1::ListSequencesRequest request;
    request.set_tenant(tenant);
    *more = false;
    for (;;) {
      const size_t left = limit - sequences.size();
      request.set_page_size(static_cast<int32_t>(std::min<size_t>(left, kPageSize)));
      auto page =
          Call<v1::ListSequencesResponse>(admin_, &v1::AdminService::Stub::ListSequences, request);
      if (!page.ok()) return page.status();
      for (v1::Sequence& sequence : *page->mutable_sequences()) {
        sequences.push_back(std::move(sequence));
      }
      *more = !page->next_page_token().empty();
      if (!*more || sequences.size() >= limit) return sequences;
      request.set_page_token(page->next_page_token());
    }
  }

  absl::StatusOr<v1::Sequence> DescribeSequence(const std::string& id) override {
    v1::DescribeSequenceRequest request;
    request.set_id(id);
    auto response = Call<v1::DescribeSequenceResponse>(
        admin_, &v1::AdminService::Stub::DescribeSequence, request);
    if (!response.ok()) return response.status();
    return response->sequence();
  }

  absl::StatusOr<v1::DescribeBlockResponse> DescribeBlock(
      const v1::DescribeBlockRequest& request) override {
    return Call<v1::DescribeBlockResponse>(admin_, &v1::AdminService::Stub::DescribeBlock, request);
  }

  absl::StatusOr<v1::ExplainResponse> Explain(const v1::ExplainRequest& request) override {
    return Call<v1::ExplainResponse>(admin_, &v1::AdminService::Stub::Explain, request);
  }

  absl::StatusOr<v1::EvictResponse> Evict(const v1::EvictRequest& request) override {
    return Call<v1::EvictResponse>(admin_, &v1::AdminService::Stub::Evict, request);
  }

  absl::StatusOr<std::vector<v1::TenantUsage>> ListTenants(const std::string& tenant, size_t limit,
                                                           bool* more) override {
    std::vector<v1::TenantUsage> usages;
    v1::ListTenantsRequest request;
    request.set_tenant(tenant);
    *more = false;
    for (;;) {
      const size_t left = limit - usages.size();
      request.set_page_size(static_cast<int32_t>(std::min<size_t>(left, kPageSize)));
      auto page =
          Call<v1::ListTenantsResponse>(admin_, &v1::AdminService::Stub::ListTenants, request);
      if (!page.ok()) return page.status();
      for (v1::TenantUsage& usage : *page->mutable_tenants()) usages.push_back(std::move(usage));
      *more = !page->next_page_token().empty();
      if (!*more || usages.size() >= limit) return usages;
      request.set_page_token(page->next_page_token());
    }
  }

  absl::StatusOr<v1::SetQuotaResponse> SetQuota(const v1::SetQuotaRequest& request) override {
    return Call<v1::SetQuotaResponse>(admin_, &v1::AdminService::Stub::SetQuota, request);
  }

  absl::StatusOr<v1::VerifyStoreResponse> VerifyStore() override {
    return Call<v1::VerifyStoreResponse>(admin_, &v1::AdminService::Stub::VerifyStore,
                                         v1::VerifyStoreRequest());
  }

  absl::Status Drain(uint32_t grace_ms) override {
    v1::DrainRequest request;
    request.set_grace_ms(grace_ms);
    return Call<v1::DrainResponse>(admin_, &v1::AdminService::Stub::Drain, request).status();
  }

 private:
  absl::StatusOr<v1::GetResponse> Get(const std::string& id) {
    v1::GetRequest get;
    get.mutable_handle()->set_id(id);
    return Call<v1::GetResponse>(sequences_, &v1::SequenceService::Stub::Get, get);
  }

  // A call on a sequence at its present generation.
  template <typename Request, typename Response>
  absl::StatusOr<v1::Sequence> OnSequence(grpc::Status (v1::SequenceService::Stub::*method)(
                                              grpc::ClientContext*, const Request&, Response*),
                                          const std::string& id, Request request = {}) {
    const auto found = Get(id);
    if (!found.ok()) return found.status();
    *request.mutable_handle() = found->sequence().handle();
    const auto response = Call<Response>(sequences_, method, request);
    if (!response.ok()) return response.status();
    return response->sequence();
  }

  template <typename Response, typename Stub, typename Request>
  absl::StatusOr<Response> Call(const std::unique_ptr<Stub>& stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request) const {
    grpc::ClientContext context;
    context.set_deadline(end_);
    Response response;
    const absl::Status status = ToStatus((stub.get()->*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

  const std::chrono::system_clock::time_point end_;
  const std::shared_ptr<grpc::Channel> data_;  // gRPC's API shares channels.
  const std::unique_ptr<v1::ModelService::Stub> models_;
  const std::unique_ptr<v1::AttentionService::Stub> attention_;
  const std::unique_ptr<v1::SequenceService::Stub> sequences_;
  const std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace

std::unique_ptr<ServerCalls> NewServerCalls(const std::string& endpoint,
                                            const std::string& admin_endpoint,
                                            const std::optional<TlsOptions>& tls,
                                            std::chrono::milliseconds timeout) {
  return std::make_unique<GrpcServerCalls>(endpoint, admin_endpoint, tls, timeout);
}

}  // namespace kvservice::client
