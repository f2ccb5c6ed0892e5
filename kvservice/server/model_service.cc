#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/server/convert.h"
#include "kvservice/server/paging.h"
#include "kvservice/server/service.h"
#include "kvservice/v1/model.grpc.pb.h"

namespace kvservice {
namespace {

using Rpc = v1::ModelService::WithRawMethod_Register<v1::ModelService::WithRawMethod_Get<
    v1::ModelService::WithRawMethod_List<v1::ModelService::Service>>>;

using RegisterCall = UnaryCall<v1::RegisterRequest, v1::RegisterResponse>;
using GetCall = UnaryCall<v1::GetModelRequest, v1::GetModelResponse>;
using ListCall = UnaryCall<v1::ListModelsRequest, v1::ListModelsResponse>;

class ModelService final : public RpcService {
 public:
  explicit ModelService(const ServiceHost& host)
      : host_(host),
        register_(BindMethod("kvservice.v1.ModelService.Register", &host_.calls, &rpc_,
                             &Rpc::RequestRegister, this, &ModelService::Register)),
        get_(BindMethod("kvservice.v1.ModelService.Get", &host_.calls, &rpc_, &Rpc::RequestGet,
                        this, &ModelService::Get)),
        list_(BindMethod("kvservice.v1.ModelService.List", &host_.calls, &rpc_, &Rpc::RequestList,
                         this, &ModelService::List)) {}

  grpc::Service* grpc_service() override { return &rpc_; }
  void Listen(grpc::ServerCompletionQueue* queue) override {
    register_.Listen(&register_, queue);
    get_.Listen(&get_, queue);
    list_.Listen(&list_, queue);
  }

 private:
  // The engine answers these at once, on the calling thread.
  void Register(std::unique_ptr<RegisterCall> call) {
    absl::StatusOr<ModelSpec> spec = ModelFromProto(call->request().model(), host_.policies->now());
    if (!spec.ok()) return RegisterCall::Reply(std::move(call), spec.status());
    const absl::StatusOr<uint64_t> fingerprint = host_.engine->RegisterModel(*std::move(spec));
    if (fingerprint.ok()) call->response()->set_fingerprint(*fingerprint);
    RegisterCall::Reply(std::move(call), fingerprint.status());
  }

  void Get(std::unique_ptr<GetCall> call) {
    const absl::StatusOr<ModelSpec> spec = host_.engine->GetModel(call->request().name());
    if (spec.ok()) {
      ModelToProto(*spec, true, call->response()->mutable_model());
      call->response()->set_fingerprint(ModelFingerprint(*spec));
    }
    GetCall::Reply(std::move(call), spec.status());
  }

  // Pages are ordered by name; the token is the last name of the page before.
  void List(std::unique_ptr<ListCall> call) {
    const absl::StatusOr<uint32_t> limit = PageSize(call->request().page_size());
    if (!limit.ok()) return ListCall::Reply(std::move(call), limit.status());
    std::vector<ModelSpec> specs = host_.engine->ListModels();
    const std::string& after = call->request().page_token();
    std::erase_if(specs,
                  [&](const ModelSpec& spec) { return !after.empty() && spec.name <= after; });
    std::sort(specs.begin(), specs.end(),
              [](const ModelSpec& a, const ModelSpec& b) { return a.name < b.name; });
    const size_t count = std::min<size_t>(specs.size(), *limit);
    for (size_t i = 0; i < count; ++i) {
      ModelToProto(specs[i], false, call->response()->add_models());
    }
    if (count < specs.size()) call->response()->set_next_page_token(specs[count - 1].name);
    ListCall::Reply(std::move(call), absl::OkStatus());
  }

  const ServiceHost host_;
  Rpc rpc_;
  const UnaryMethod<v1::RegisterRequest, v1::RegisterResponse> register_;
  const UnaryMethod<v1::GetModelRequest, v1::GetModelResponse> get_;
  const UnaryMethod<v1::ListModelsRequest, v1::ListModelsResponse> list_;
};

}  // namespace

std::unique_ptr<RpcService> NewModelService(const ServiceHost& host) {
  return std::make_unique<ModelService>(host);
}

}  // namespace kvservice
