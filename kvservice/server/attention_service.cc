#include <memory>
#include <string>
#include <utility>

#include "kvservice/server/attend_reply.h"
#include "kvservice/server/attend_run.h"
#include "kvservice/server/attend_stream.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/service.h"
#include "kvservice/v1/attention.grpc.pb.h"

namespace kvservice {
namespace {

using Declared = v1::AttentionService;
using NotServed = Declared::WithGenericMethod_Select<Declared::Service>;
using Rpc = Declared::WithRawMethod_Attend<
    Declared::WithRawMethod_AttendStream<Declared::WithRawMethod_Audit<NotServed>>>;

using AttendRpcCall = UnaryCall<v1::AttendRequest, v1::AttendResponse>;
using AuditRpcCall = UnaryCall<v1::AuditRequest, v1::AuditResponse>;

// A call on its way through the engine, which borrows the tensors of its request. Owns itself from
// the moment the engine has it until `done`.
struct PendingAttend {
  std::unique_ptr<AttendRpcCall> rpc;
  AttendRun run;
};

class AttentionService final : public RpcService {
 public:
  explicit AttentionService(const ServiceHost& host)
      : host_(host),
        attend_(BindMethod("kvservice.v1.AttentionService.Attend", &host_.calls, &rpc_,
                           &Rpc::RequestAttend, this, &AttentionService::Attend)),
        audit_(BindMethod("kvservice.v1.AttentionService.Audit", &host_.calls, &rpc_,
                          &Rpc::RequestAudit, this, &AttentionService::Audit)),
        attend_stream_{
            .host = host,
            .access = AccessOf("kvservice.v1.AttentionService.AttendStream"),
            .request = [this](grpc::ServerContext* context, AttendStreamMethod::Stream* stream,
                              grpc::ServerCompletionQueue* queue, void* tag) {
              rpc_.RequestAttendStream(context, stream, queue, queue, tag);
            }} {}

  grpc::Service* grpc_service() override { return &rpc_; }
  void Listen(grpc::ServerCompletionQueue* queue) override {
    attend_.Listen(&attend_, queue);
    audit_.Listen(&audit_, queue);
    AttendStream::Listen(&attend_stream_, queue);
  }

 private:
  void Attend(std::unique_ptr<AttendRpcCall> rpc) {
    auto pending = std::make_unique<PendingAttend>();
    const absl::Status status =
        PrepareAttend(rpc->request(), host_.policies->now(), rpc->tenant(), nullptr, &pending->run);
    if (!status.ok()) return AttendRpcCall::Reply(std::move(rpc), status);
    pending->run.arrived_ns = rpc->arrived_ns();
    pending->rpc = std::move(rpc);
    PendingAttend* const owned_by_done = pending.release();
    owned_by_done->run.call.done = [this, owned_by_done](const absl::Status& done) {
      Done(std::unique_ptr<PendingAttend>(owned_by_done), done);
    };
    host_.engine->Attend(&owned_by_done->run.call);
  }

  void Done(std::unique_ptr<PendingAttend> pending, const absl::Status& status) {
    if (!status.ok()) return AttendRpcCall::Reply(std::move(pending->rpc), status);
    v1::AttendResponse* const response = pending->rpc->response();
    DescribeAttend(pending->rpc->request(), pending->run, host_.calls, response);
    AttendRpcCall::ReplyBytes(std::move(pending->rpc),
                              SerializeAttendReply(response, &pending->run));
  }

  void Audit(std::unique_ptr<AuditRpcCall> rpc) {
    const absl::StatusOr<SequenceId> id = IdFromProto(rpc->request().handle().id(), "handle.id");
    if (!id.ok()) return AuditRpcCall::Reply(std::move(rpc), id.status());
    absl::StatusOr<AuditAsk> ask = AuditFromProto(rpc->request());
    if (!ask.ok()) return AuditRpcCall::Reply(std::move(rpc), ask.status());
    const std::string tenant = rpc->tenant();
    host_.engine->Audit(tenant, *id, *std::move(ask),
                        [rpc = std::move(rpc)](const absl::StatusOr<AuditReport>& report) mutable {
                          if (report.ok()) AuditToProto(*report, rpc->response());
                          AuditRpcCall::Reply(std::move(rpc), report.status());
                        });
  }

  const ServiceHost host_;
  Rpc rpc_;
  const UnaryMethod<v1::AttendRequest, v1::AttendResponse> attend_;
  const UnaryMethod<v1::AuditRequest, v1::AuditResponse> audit_;
  const AttendStreamMethod attend_stream_;
};

}  // namespace

std::unique_ptr<RpcService> NewAttentionService(const ServiceHost& host) {
  return std::make_unique<AttentionService>(host);
}

}  // namespace kvservice
