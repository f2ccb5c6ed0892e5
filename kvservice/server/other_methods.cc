// Calls of methods that no service listens for: health, and those that are not there.

#include <google/protobuf/descriptor.h>
#include <google/protobuf/wrappers.pb.h>
#include <grpcpp/generic/async_generic_service.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "kvservice/error.h"
#include "kvservice/server/health.h"
#include "kvservice/server/service.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

// grpc.health.v1 is not packaged for C++, but its messages are one field each, with the number and
// type that these have: HealthCheckRequest{string 1}, HealthCheckResponse{enum 1}.
using HealthCheckRequest = google::protobuf::StringValue;
using HealthCheckResponse = google::protobuf::Int32Value;

constexpr char kOwnMethods[] = "/kvservice.v1.";

// "kvservice.v1.AdminService.Explain" of "/kvservice.v1.AdminService/Explain".
std::string FullName(const std::string& method) {
  std::string name = method.substr(std::min<size_t>(1, method.size()));
  std::replace(name.begin(), name.end(), '/', '.');
  return name;
}

bool IsDeclared(const std::string& method) {
  return google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(FullName(method)) !=
         nullptr;
}

// Health, and methods that are not of this API, are for every caller that is known.
MethodAccess AccessOfOther(const std::string& method) {
  MethodAccess access = AccessOf(FullName(method));
  access.is_for_all = method.rfind(kOwnMethods, 0) != 0 || !IsDeclared(method);
  return access;
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

absl::Status ServiceUnknown(const std::string& service) {
  return MakeError(absl::StatusCode::kNotFound, "the health of " + service + " is not known here",
                   {.reason = "SERVICE_UNKNOWN", .field = "service", .metadata = {}});
}

grpc::ByteBuffer HealthReply(HealthStatus status) {
  HealthCheckResponse response;
  response.set_value(static_cast<int32_t>(status));
  return SerializeMessage(response);
}

// listening -> (arrives) -> finishing                             -> deleted    not there
//                        -> reading -> finishing                  -> deleted    Check
//                        -> reading -> watching <-> writing -> (client gone) -> finishing
//
// Deleted when the call is done as well, of which gRPC tells besides.
class OtherMethodCall final {
 public:
  static void Listen(const OtherMethods& methods, grpc::ServerCompletionQueue* queue) {
    auto* const call = new OtherMethodCall(methods, queue);
    call->context_.AsyncNotifyWhenDone(call->done_.tag());
    methods.generic->RequestCall(&call->context_, &call->stream_, queue, queue,
                                 call->arrived_.tag());
  }
  OtherMethodCall(const OtherMethodCall&) = delete;
  OtherMethodCall& operator=(const OtherMethodCall&) = delete;

 private:
  // Tells the call which of its operations has ended.
  class Event final : public CompletionTag {
   public:
    Event(OtherMethodCall* call, void (OtherMethodCall::*handle)(bool ok))
        : call_(call), handle_(handle) {}
    void Complete(bool ok) override { (call_->*handle_)(ok); }
    void* tag() { return static_cast<CompletionTag*>(this); }

   private:
    OtherMethodCall* const call_;
    void (OtherMethodCall::*const handle_)(bool ok);
  };

  OtherMethodCall(const OtherMethods& methods, grpc::ServerCompletionQueue* queue)
      : methods_(methods), queue_(queue) {}
  ~OtherMethodCall() = default;

  void Arrived(bool ok) {
    if (!ok) {
      delete this;
      return;
    }
    // Nobody waits for the end of a watch.
    is_watch_ = context_.method() == kHealthWatchMethod;
    InFlight* const in_flight = methods_.host->in_flight;
    is_watch_ ? in_flight->EnterStream() : in_flight->Enter();
    Listen(methods_, queue_);
    const MethodAccess access = AccessOfOther(context_.method());
    const Caller caller = methods_.host->gate->Identify(context_);
    const absl::Status allowed = methods_.host->gate->Allow(access, caller);
    if (!allowed.ok()) return Refuse(access, caller, allowed);
    if (is_watch_ || context_.method() == kHealthCheckMethod) {
      stream_.Read(&message_, read_.tag());
      return;
    }
    Refuse(access, caller, Unimplemented(context_.method()));
  }

  void Refuse(const MethodAccess& access, const Caller& caller, const absl::Status& status) {
    methods_.host->gate->Ended({.method = access, .caller = caller, .status = status});
    const std::lock_guard<std::mutex> lock(mutex_);
    Finish(ToGrpcStatus(status, &context_));
  }

  void Read(bool ok) {
    HealthCheckRequest request;
    absl::Status status = ok ? ParseMessage(&message_, &request) : MessageMalformed(request);
    if (status.ok() && is_watch_) {
      const uint64_t number =
          methods_.health->Watch(request.value(), [this](HealthStatus changed) { Tell(changed); });
      const std::lock_guard<std::mutex> lock(mutex_);
      // Only from here on is anything written: what is written can end this call.
      watcher_ = number;
      return Write();
    }
    const HealthStatus health = methods_.health->Get(request.value());
    if (status.ok() && health == HealthStatus::kServiceUnknown) {
      status = ServiceUnknown(request.value());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!status.ok()) return Finish(ToGrpcStatus(status, &context_));
    is_finishing_ = true;
    stream_.WriteAndFinish(HealthReply(health), {}, grpc::Status::OK, finished_.tag());
  }

  // Of changes that come while one is written, the latest is written next.
  void Tell(HealthStatus health) {
    const std::lock_guard<std::mutex> lock(mutex_);
    next_ = health;
    if (watcher_ != 0) Write();
  }
  void Written(bool ok) {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_writing_ = false;
    is_over_ = is_over_ || !ok;
    Write();
  }
  // The client is gone, or everything was said.
  void Done(bool /*ok*/) {
    bool is_last = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_done_ = is_over_ = true;
      if (watcher_ != 0) Write();
      is_last = has_finished_;
    }
    if (is_last) Delete();
  }
  void Finished(bool /*ok*/) {
    bool is_last = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      has_finished_ = true;
      is_last = is_done_;
    }
    if (is_last) Delete();
  }

  // These need mutex_ held.
  void Write() {
    if (is_writing_ || is_finishing_) return;
    if (is_over_) return Finish(grpc::Status::CANCELLED);
    if (next_ == told_) return;
    told_ = next_;
    is_writing_ = true;
    stream_.Write(HealthReply(told_), written_.tag());
  }
  void Finish(const grpc::Status& status) {
    is_finishing_ = true;
    stream_.Finish(status, finished_.tag());
  }

  void Delete() {
    // Here, as a watch may begin after the client has gone.
    if (watcher_ != 0) methods_.health->Unwatch(watcher_);
    InFlight* const in_flight = methods_.host->in_flight;
    const bool is_watch = is_watch_;
    delete this;
    is_watch ? in_flight->LeaveStream() : in_flight->Leave(0);
  }

  const OtherMethods methods_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  Event arrived_{this, &OtherMethodCall::Arrived};
  Event read_{this, &OtherMethodCall::Read};
  Event written_{this, &OtherMethodCall::Written};
  Event finished_{this, &OtherMethodCall::Finished};
  Event done_{this, &OtherMethodCall::Done};
  grpc::ByteBuffer message_;
  bool is_watch_ = false;
  // 0 = none.
  uint64_t watcher_ = 0;

  std::mutex mutex_;
  // Guarded by mutex_.
  HealthStatus told_ = HealthStatus{0};
  HealthStatus next_ = HealthStatus{0};
  bool is_writing_ = false;
  bool is_over_ = false;
  bool is_finishing_ = false;
  bool has_finished_ = false;
  bool is_done_ = false;
};

}  // namespace

void ListenForOtherMethods(const OtherMethods& methods, grpc::ServerCompletionQueue* queue) {
  OtherMethodCall::Listen(methods, queue);
}

}  // namespace kvservice
