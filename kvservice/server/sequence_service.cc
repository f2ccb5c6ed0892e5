#include <memory>
#include <optional>
#include <utility>

#include "kvservice/error.h"
#include "kvservice/server/append_stream.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"
#include "kvservice/server/receive_stream.h"
#include "kvservice/server/service.h"
#include "kvservice/v1/sequence.grpc.pb.h"

namespace kvservice {
namespace {

using Declared = v1::SequenceService;
using Elsewhere =
    Declared::WithRawMethod_Transfer<Declared::WithRawMethod_Receive<Declared::Service>>;
using OnDisk = Declared::WithRawMethod_Suspend<Declared::WithRawMethod_Resume<Elsewhere>>;
using Rpc = Declared::WithRawMethod_Create<Declared::WithRawMethod_Fork<
    Declared::WithRawMethod_Truncate<Declared::WithRawMethod_Append<Declared::WithRawMethod_Get<
        Declared::WithRawMethod_Drop<Declared::WithRawMethod_RenewLease<OnDisk>>>>>>>;

using CreateCall = UnaryCall<v1::CreateRequest, v1::CreateResponse>;
using ForkCall = UnaryCall<v1::ForkRequest, v1::ForkResponse>;
using TruncateCall = UnaryCall<v1::TruncateRequest, v1::TruncateResponse>;
using GetCall = UnaryCall<v1::GetRequest, v1::GetResponse>;
using DropCall = UnaryCall<v1::DropRequest, v1::DropResponse>;
using RenewLeaseCall = UnaryCall<v1::RenewLeaseRequest, v1::RenewLeaseResponse>;
using SuspendCall = UnaryCall<v1::SuspendRequest, v1::SuspendResponse>;
using ResumeCall = UnaryCall<v1::ResumeRequest, v1::ResumeResponse>;
using TransferCall = UnaryCall<v1::TransferRequest, v1::TransferResponse>;

constexpr size_t kRequestIdBytesMax = 64;
constexpr uint32_t kWholeLength = UINT32_MAX;

// Answers with the sequence that the engine returned.
template <typename Call>
Done<SequenceInfo> ReplyWithSequence(std::unique_ptr<Call> call) {
  return [call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
    if (info.ok()) SequenceToProto(*info, call->response()->mutable_sequence());
    Call::Reply(std::move(call), info.status());
  };
}

class SequenceService final : public RpcService {
 public:
  explicit SequenceService(const ServiceHost& host)
      : host_(host),
        create_(Bind("Create", &Rpc::RequestCreate, &SequenceService::Create)),
        fork_(Bind("Fork", &Rpc::RequestFork, &SequenceService::Fork)),
        truncate_(Bind("Truncate", &Rpc::RequestTruncate, &SequenceService::Truncate)),
        get_(Bind("Get", &Rpc::RequestGet, &SequenceService::Get)),
        drop_(Bind("Drop", &Rpc::RequestDrop, &SequenceService::Drop)),
        renew_lease_(Bind("RenewLease", &Rpc::RequestRenewLease, &SequenceService::RenewLease)),
        suspend_(Bind("Suspend", &Rpc::RequestSuspend, &SequenceService::Suspend)),
        resume_(Bind("Resume", &Rpc::RequestResume, &SequenceService::Resume)),
        transfer_(Bind("Transfer", &Rpc::RequestTransfer, &SequenceService::Transfer)) {
    receive_.access = AccessOf("kvservice.v1.SequenceService.Receive");
    receive_.host = host.calls;
    receive_.engine = host.engine;
    receive_.request = [this](grpc::ServerContext* context, ReceiveMethod::Stream* stream,
                              grpc::ServerCompletionQueue* queue, void* tag) {
      rpc_.RequestReceive(context, stream, queue, queue, tag);
    };
    append_.host = host.calls;
    append_.access = AccessOf("kvservice.v1.SequenceService.Append");
    append_.engine = host.engine;
    append_.request = [this](grpc::ServerContext* context, AppendMethod::Reader* reader,
                             grpc::ServerCompletionQueue* queue,
                             void* tag) { rpc_.RequestAppend(context, reader, queue, queue, tag); };
  }

  grpc::Service* grpc_service() override { return &rpc_; }
  void Listen(grpc::ServerCompletionQueue* queue) override {
    create_.Listen(&create_, queue);
    fork_.Listen(&fork_, queue);
    truncate_.Listen(&truncate_, queue);
    AppendStream::Listen(&append_, queue);
    get_.Listen(&get_, queue);
    drop_.Listen(&drop_, queue);
    renew_lease_.Listen(&renew_lease_, queue);
    suspend_.Listen(&suspend_, queue);
    resume_.Listen(&resume_, queue);
    transfer_.Listen(&transfer_, queue);
    ReceiveStream::Listen(&receive_, queue);
  }

 private:
  template <typename Request, typename Response, typename Base>
  UnaryMethod<Request, Response> Bind(
      const char* name,
      void (Base::*request)(grpc::ServerContext*, grpc::ByteBuffer*,
                            grpc::ServerAsyncResponseWriter<grpc::ByteBuffer>*,
                            grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*),
      void (SequenceService::*handle)(std::unique_ptr<UnaryCall<Request, Response>>)) {
    return BindMethod(std::string("kvservice.v1.SequenceService.") + name, &host_.calls, &rpc_,
                      request, this, handle);
  }

  void Create(std::unique_ptr<CreateCall> call) {
    const v1::CreateRequest& request = call->request();
    if (request.request_id().size() > kRequestIdBytesMax) {
      return CreateCall::Reply(std::move(call), InvalidField("request_id", "REQUEST_ID_TOO_LONG",
                                                             "request_id has more than 64 bytes"));
    }
    CreateOptions options{
        .model = request.model(),
        .lease_ms = request.lease_ms(),
        .policy = std::nullopt,
        .request_id = request.request_id(),
        .token_ids = {request.token_ids().data(), static_cast<size_t>(request.token_ids_size())}};
    if (request.has_policy()) {
      absl::StatusOr<Policy> policy =
          PolicyFromProto(request.policy(), "policy", host_.policies->now());
      if (!policy.ok()) return CreateCall::Reply(std::move(call), policy.status());
      options.policy = *std::move(policy);
    }
    const std::string tenant = call->tenant();
    host_.engine->Create(
        tenant, std::move(options),
        [call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
          if (info.ok()) {
            SequenceToProto(*info, call->response()->mutable_sequence());
            call->response()->set_matched_tokens(info->matched_tokens);
          }
          CreateCall::Reply(std::move(call), info.status());
        });
  }

  void Fork(std::unique_ptr<ForkCall> call) {
    const v1::ForkRequest& request = call->request();
    const absl::StatusOr<SequenceId> id = IdFromProto(request.handle().id(), "handle.id");
    if (!id.ok()) return ForkCall::Reply(std::move(call), id.status());
    const uint32_t length = request.has_length_tokens() ? request.length_tokens() : kWholeLength;
    const uint64_t generation = request.handle().generation();
    const uint32_t lease_ms = request.lease_ms();
    const std::string tenant = call->tenant();
    host_.engine->Fork(tenant, *id, generation, length, lease_ms,
                       ReplyWithSequence(std::move(call)));
  }

  void Truncate(std::unique_ptr<TruncateCall> call) {
    const v1::TruncateRequest& request = call->request();
    const absl::StatusOr<SequenceId> id = IdFromProto(request.handle().id(), "handle.id");
    if (!id.ok()) return TruncateCall::Reply(std::move(call), id.status());
    const uint64_t generation = request.handle().generation();
    const uint32_t length = request.length_tokens();
    const std::string tenant = call->tenant();
    host_.engine->Truncate(tenant, *id, generation, length, ReplyWithSequence(std::move(call)));
  }

  // Answers whatever the handle's generation: it is how a caller learns the current one.
  void Get(std::unique_ptr<GetCall> call) {
    const absl::StatusOr<SequenceId> id = IdFromProto(call->request().handle().id(), "handle.id");
    if (!id.ok()) return GetCall::Reply(std::move(call), id.status());
    const std::string tenant = call->tenant();
    host_.engine->Get(tenant, *id, ReplyWithSequence(std::move(call)));
  }

  void Drop(std::unique_ptr<DropCall> call) {
    const absl::StatusOr<SequenceId> id = IdFromProto(call->request().handle().id(), "handle.id");
    if (!id.ok()) return DropCall::Reply(std::move(call), id.status());
    const std::string tenant = call->tenant();
    host_.engine->Drop(tenant, *id,
                       [call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
                         DropCall::Reply(std::move(call), info.status());
                       });
  }

  void RenewLease(std::unique_ptr<RenewLeaseCall> call) {
    const v1::RenewLeaseRequest& request = call->request();
    const absl::StatusOr<SequenceId> id = IdFromProto(request.handle().id(), "handle.id");
    if (!id.ok()) return RenewLeaseCall::Reply(std::move(call), id.status());
    const uint64_t generation = request.handle().generation();
    const uint32_t lease_ms = request.lease_ms();
    const std::string tenant = call->tenant();
    host_.engine->RenewLease(
        tenant, *id, generation, lease_ms,
        [call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
          if (info.ok()) call->response()->set_lease_remaining_ms(info->lease_remaining_ms);
          RenewLeaseCall::Reply(std::move(call), info.status());
        });
  }

  void Suspend(std::unique_ptr<SuspendCall> call) {
    const absl::StatusOr<SequenceId> id = IdFromProto(call->request().handle().id(), "handle.id");
    if (!id.ok()) return SuspendCall::Reply(std::move(call), id.status());
    const uint64_t generation = call->request().handle().generation();
    const std::string tenant = call->tenant();
    host_.engine->Suspend(tenant, *id, generation, ReplyWithSequence(std::move(call)));
  }

  void Resume(std::unique_ptr<ResumeCall> call) {
    const absl::StatusOr<SequenceId> id = IdFromProto(call->request().handle().id(), "handle.id");
    if (!id.ok()) return ResumeCall::Reply(std::move(call), id.status());
    const uint64_t generation = call->request().handle().generation();
    const std::string tenant = call->tenant();
    host_.engine->Resume(tenant, *id, generation, ReplyWithSequence(std::move(call)));
  }

  void Transfer(std::unique_ptr<TransferCall> call) {
    const v1::TransferRequest& request = call->request();
    const absl::StatusOr<SequenceId> id = IdFromProto(request.handle().id(), "handle.id");
    if (!id.ok()) return TransferCall::Reply(std::move(call), id.status());
    TransferAsk ask = {.tenant = call->tenant(),
                       .id = *id,
                       .generation = request.handle().generation(),
                       .target_endpoint = request.target_endpoint(),
                       .move = request.move(),
                       .deadline = call->deadline()};
    host_.transfers->Start(
        std::move(ask),
        [call = std::move(call)](const absl::StatusOr<TransferOutcome>& outcome) mutable {
          if (outcome.ok()) {
            v1::TransferResponse* const response = call->response();
            response->mutable_handle()->set_id(outcome->id.bytes.data(), outcome->id.bytes.size());
            response->mutable_handle()->set_generation(outcome->generation);
            response->set_sent_bytes(outcome->sent_bytes);
            response->set_moved(outcome->moved);
          }
          TransferCall::Reply(std::move(call), outcome.status());
        });
  }

  const ServiceHost host_;
  Rpc rpc_;
  AppendMethod append_;
  ReceiveMethod receive_;
  const UnaryMethod<v1::CreateRequest, v1::CreateResponse> create_;
  const UnaryMethod<v1::ForkRequest, v1::ForkResponse> fork_;
  const UnaryMethod<v1::TruncateRequest, v1::TruncateResponse> truncate_;
  const UnaryMethod<v1::GetRequest, v1::GetResponse> get_;
  const UnaryMethod<v1::DropRequest, v1::DropResponse> drop_;
  const UnaryMethod<v1::RenewLeaseRequest, v1::RenewLeaseResponse> renew_lease_;
  const UnaryMethod<v1::SuspendRequest, v1::SuspendResponse> suspend_;
  const UnaryMethod<v1::ResumeRequest, v1::ResumeResponse> resume_;
  const UnaryMethod<v1::TransferRequest, v1::TransferResponse> transfer_;
};

}  // namespace

std::unique_ptr<RpcService> NewSequenceService(const ServiceHost& host) {
  return std::make_unique<SequenceService>(host);
}

}  // namespace kvservice
