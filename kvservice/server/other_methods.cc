#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/async_generic_service.h>

#include <algorithm>
#include <string>

#include "kvservice/error.h"
#include "kvservice/server/service.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

// "/kvservice.v1.AdminService/Explain" is declared if the API has such a method.
bool IsDeclared(const std::string& method) {
  std::string name = method.substr(std::min<size_t>(1, method.size()));
  std::replace(name.begin(), name.end(), '/', '.');
  return google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(name) != nullptr;
}

absl::Status Unimplemented(const std::string& method) {
  const bool declared = IsDeclared(method);
  return MakeError(
      absl::StatusCode::kUnimplemented,
      declared ? "this version does not serve " + method : "there is no method " + method,
      {.reason = declared ? "METHOD_NOT_SERVED" : "METHOD_UNKNOWN",
       .field = {},
       .metadata = {{"method", method}}});
}

// listening -> (arrives) -> replying -> deleted; the request is never read.
class OtherMethodCall final : public CompletionTag {
 public:
  static void Listen(grpc::AsyncGenericService* generic, const CallHost* host,
                     grpc::ServerCompletionQueue* queue) {
    auto* const call = new OtherMethodCall(generic, host, queue);
    generic->RequestCall(&call->context_, &call->stream_, queue, queue,
                         static_cast<CompletionTag*>(call));
  }

  void Complete(bool ok) override {
    if (replying_ || !ok) {
      delete this;
      return;
    }
    replying_ = true;
    host_->in_flight->Enter();
    Listen(generic_, host_, queue_);
    const absl::Status status = Unimplemented(context_.method());
    host_->gate->Ended("Other", {}, status, 0);
    stream_.Finish(ToGrpcStatus(status, &context_), static_cast<CompletionTag*>(this));
  }

 private:
  OtherMethodCall(grpc::AsyncGenericService* generic, const CallHost* host,
                  grpc::ServerCompletionQueue* queue)
      : generic_(generic), host_(host), queue_(queue) {}
  ~OtherMethodCall() {
    if (replying_) host_->in_flight->Leave(0);
  }

  grpc::AsyncGenericService* const generic_;
  const CallHost* const host_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  bool replying_ = false;
};

}  // namespace

void ListenForOtherMethods(grpc::AsyncGenericService* generic, const CallHost* host,
                           grpc::ServerCompletionQueue* queue) {
  OtherMethodCall::Listen(generic, host, queue);
}

}  // namespace kvservice
