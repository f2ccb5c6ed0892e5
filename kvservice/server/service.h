// The services that the server offers, each behind the same small interface. Their handlers
// convert, call the engine and reply; what is common to all calls lives in call.h.

#ifndef KVSERVICE_KVSERVICE_SERVER_SERVICE_H_
#define KVSERVICE_KVSERVICE_SERVER_SERVICE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "kvservice/engine.h"
#include "kvservice/server/call.h"
#include "kvservice/server/live_policies.h"
#include "kvservice/server/transfers.h"

namespace grpc {
class AsyncGenericService;
class ServerCompletionQueue;
class Service;
}  // namespace grpc

namespace kvservice {

class RpcService {
 public:
  virtual ~RpcService() = default;
  // What gRPC registers; owned by this object.
  virtual grpc::Service* grpc_service() = 0;
  // Asks for the first call of every method served on `queue`. Once per queue, after the server has
  // started.
  virtual void Listen(grpc::ServerCompletionQueue* queue) = 0;
};

// What services need; everything is borrowed and outlives them.
struct ServiceHost {
  CallHost calls;
  Engine* engine = nullptr;
  const LivePolicies* policies = nullptr;
  // Of the data side; nullptr elsewhere.
  Transfers* transfers = nullptr;
};

// What the admin service tells and does besides. Constant after construction; `request_drain` is
// thread-safe and returns at once.
struct AdminFacts {
  uint64_t epoch = 0;
  uint64_t started_ns = 0;
  // Bounds the tokens of any sequence.
  uint32_t sequence_tokens_max = 0;
  // Name (with unit) to value.
  std::map<std::string, uint64_t> limits;
  std::function<bool()> draining;
  // Milliseconds of grace; 0 = the server's default.
  std::function<void(uint32_t grace_ms)> request_drain;
};

std::unique_ptr<RpcService> NewAttentionService(const ServiceHost& host);
std::unique_ptr<RpcService> NewSequenceService(const ServiceHost& host);
std::unique_ptr<RpcService> NewModelService(const ServiceHost& host);
std::unique_ptr<RpcService> NewAdminService(const ServiceHost& host, AdminFacts facts);

class HealthBoard;

// What is borrowed for the calls of methods that no service listens for.
struct OtherMethods {
  grpc::AsyncGenericService* generic = nullptr;
  const CallHost* host = nullptr;
  HealthBoard* health = nullptr;
};
// Answers grpc.health.v1.Health (NOT_FOUND / SERVICE_UNKNOWN), and all other methods that no
// service listens for: UNIMPLEMENTED / METHOD_NOT_SERVED for those that the API declares,
// METHOD_UNKNOWN for the others. A completion-queue server would leave such calls without any
// answer.
void ListenForOtherMethods(const OtherMethods& methods, grpc::ServerCompletionQueue* queue);

// Ties a method of a generated service `rpc` (Rpc::RequestX) and a member function of the
// implementation together. `name` is that of the descriptor,
// "kvservice.v1.ModelService.Get".
template <typename Request, typename Response, typename Rpc, typename Base, typename Impl>
UnaryMethod<Request, Response> BindMethod(
    const std::string& name, const CallHost* host, Rpc* rpc,
    void (Base::*request)(grpc::ServerContext*, grpc::ByteBuffer*,
                          grpc::ServerAsyncResponseWriter<grpc::ByteBuffer>*,
                          grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*),
    Impl* impl, void (Impl::*handle)(std::unique_ptr<UnaryCall<Request, Response>>)) {
  return {.access = AccessOf(name),
          .host = host,
          .request =
              [rpc, request](UnaryWire* wire, grpc::ServerCompletionQueue* queue, void* tag) {
                (rpc->*request)(&wire->context, &wire->request, &wire->responder, queue, queue,
                                tag);
              },
          .handle =
              [impl, handle](std::unique_ptr<UnaryCall<Request, Response>> call) {
                (impl->*handle)(std::move(call));
              }};
}

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_SERVICE_H_
