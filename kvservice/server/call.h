// The life of a call on a completion queue. One state machine serves every unary method:
//
//     listening -> (arrives) -> running -> (Reply) -> replying -> (sent) -> deleted
//
// A call is asked for before it exists; when it arrives the next one of its method is asked for at
// once. It runs on the queue's thread until its handler has handed the work to the engine; the
// answer comes back on the engine's thread, which fills the response and replies. Messages are
// parsed and serialized here rather than by gRPC, so that a malformed one gets a typed error.

#ifndef KVSERVICE_KVSERVICE_SERVER_CALL_H_
#define KVSERVICE_KVSERVICE_SERVER_CALL_H_

#include <grpcpp/completion_queue.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/async_unary_call.h>
#include <grpcpp/support/byte_buffer.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "google/protobuf/message_lite.h"
#include "kvservice/clock.h"
#include "kvservice/server/access.h"
#include "kvservice/server/in_flight.h"

namespace kvservice {

// What a completion queue's events point to.
class CompletionTag {
 public:
  // On the thread of the queue. `ok` as gRPC means it for the operation that ended. May delete the
  // tag.
  virtual void Complete(bool ok) = 0;

 protected:
  ~CompletionTag() = default;
};

// An Attend between its arrival and its answer.
struct AttendTimes {
  uint64_t call_number = 0;
  uint32_t layer = 0;
  size_t row_count = 0;
  // Waiting for the engine, and from there on.
  uint64_t queue_ns = 0;
  uint64_t service_ns = 0;
};

// A call that has ended; everything is borrowed.
struct CallRecord {
  const MethodAccess& method;
  const Caller& caller;
  const absl::Status& status;
  uint64_t duration_ns = 0;
  // What the call was about, for the access log: the id of a sequence, or a tenant.
  std::string_view subject = {};
};

// Decides whether a call that arrived may run, and hears of each that ended. Every call passes
// here, whichever way it came. Thread-safe.
class CallGate {
 public:
  virtual ~CallGate() = default;
  // Who is at the other end; whether that one may do anything is Admit's business.
  virtual Caller Identify(const grpc::ServerContext& context) = 0;
  // OK, or why the caller may not (CheckAccess).
  virtual absl::Status Allow(const MethodAccess& method, const Caller& caller) = 0;
  // The same, or UNAVAILABLE / DRAINING.
  virtual absl::Status Admit(const MethodAccess& method, const Caller& caller) = 0;
  virtual void Ended(const CallRecord& record) = 0;
  // Of an Attend that is about to be answered.
  virtual void Attended(const AttendTimes& /*times*/) {}
};

// What calls need of their server; borrowed, outlives them.
struct CallHost {
  CallGate* gate = nullptr;
  InFlight* in_flight = nullptr;
  Clock* clock = nullptr;
};

// The ends of one call that gRPC fills and drains.
struct UnaryWire {
  grpc::ServerContext context;
  grpc::ByteBuffer request;
  grpc::ServerAsyncResponseWriter<grpc::ByteBuffer> responder{&context};
};

// INVALID_ARGUMENT / MESSAGE_MALFORMED with the message's type.
absl::Status MessageMalformed(const google::protobuf::MessageLite& message);
// MESSAGE_MALFORMED when the bytes are no such message. Empties the buffer.
absl::Status ParseMessage(grpc::ByteBuffer* buffer, google::protobuf::MessageLite* message);
grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message);
// RESOURCE_EXHAUSTED / OVERLOADED with a retry delay: the requests being served occupy all they
// may.
absl::Status RequestBytesExhausted();

// The part of the machine that does not depend on the messages' types.
class UnaryCallBase : public CompletionTag {
 public:
  UnaryCallBase(const MethodAccess* method, const CallHost* host) : method_(method), host_(host) {}
  virtual ~UnaryCallBase();
  UnaryCallBase(const UnaryCallBase&) = delete;
  UnaryCallBase& operator=(const UnaryCallBase&) = delete;

  void Complete(bool ok) final;
  const std::string& tenant() const { return caller_.tenant; }
  void set_subject(std::string subject) { subject_ = std::move(subject); }
  uint64_t arrived_ns() const { return arrived_ns_; }
  // The caller's; far away if it has none.
  std::chrono::system_clock::time_point deadline() const { return wire_.context.deadline(); }

 protected:
  // Asks for the next call of the same method.
  virtual void ListenForNext() = 0;
  virtual google::protobuf::MessageLite* request_message() = 0;
  // Runs the handler, which owns the call from here on.
  virtual void Run() = 0;

  // Sends the response, or the error, and gives the call to its last event.
  static void Finish(std::unique_ptr<UnaryCallBase> call, const absl::Status& status,
                     const grpc::ByteBuffer& response);

  UnaryWire wire_;

 private:
  absl::Status Prepare();

  enum class State { kListening, kRunning, kReplying };
  const MethodAccess* const method_;
  const CallHost* const host_;
  State state_ = State::kListening;
  Caller caller_;
  std::string subject_;
  uint64_t arrived_ns_ = 0;
  size_t reserved_bytes_ = 0;
};

template <typename Request, typename Response>
class UnaryCall;

// What a service says about one of its unary methods.
template <typename Request, typename Response>
struct UnaryMethod {
  MethodAccess access;
  const CallHost* host = nullptr;
  // Asks gRPC for a call.
  std::function<void(UnaryWire* wire, grpc::ServerCompletionQueue* queue, void* tag)> request;
  // Takes the call over and passes it to UnaryCall::Reply exactly once.
  std::function<void(std::unique_ptr<UnaryCall<Request, Response>> call)> handle;

  // `method` is borrowed; it outlives all its calls.
  static void Listen(const UnaryMethod* method, grpc::ServerCompletionQueue* queue) {
    UnaryCall<Request, Response>::Listen(method, queue);
  }
};

template <typename Request, typename Response>
class UnaryCall final : public UnaryCallBase {
 public:
  using Method = UnaryMethod<Request, Response>;

  static void Listen(const Method* method, grpc::ServerCompletionQueue* queue) {
    auto call = std::unique_ptr<UnaryCall>(new UnaryCall(method, queue));
    UnaryCall* const tag = call.release();
    method->request(&tag->wire_, queue, static_cast<CompletionTag*>(tag));
  }

  const Request& request() const { return request_; }
  Response* response() { return &response_; }

  static void Reply(std::unique_ptr<UnaryCall> call, const absl::Status& status) {
    const grpc::ByteBuffer response =
        status.ok() ? SerializeMessage(call->response_) : grpc::ByteBuffer();
    Finish(std::move(call), status, response);
  }
  // With a response that was serialized elsewhere.
  static void ReplyBytes(std::unique_ptr<UnaryCall> call, const grpc::ByteBuffer& response) {
    Finish(std::move(call), absl::OkStatus(), response);
  }

 private:
  UnaryCall(const Method* method, grpc::ServerCompletionQueue* queue)
      : UnaryCallBase(&method->access, method->host), definition_(method), queue_(queue) {}

  void ListenForNext() override { Listen(definition_, queue_); }
  google::protobuf::MessageLite* request_message() override { return &request_; }
  void Run() override { definition_->handle(std::unique_ptr<UnaryCall>(this)); }

  const Method* const definition_;
  grpc::ServerCompletionQueue* const queue_;
  Request request_;
  Response response_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CALL_H_
