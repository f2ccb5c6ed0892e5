#include "kvservice/server/rpc_server.h"

#include <grpc/grpc.h>
#include <grpcpp/alarm.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/resource.h>

#include <algorithm>
#include <future>
#include <thread>
#include <utility>

#include "kvservice/error.h"
#include "kvservice/server/accept_loop.h"
#include "kvservice/server/health.h"
#include "kvservice/server/tenancy.h"
#include "kvservice/spin.h"

namespace kvservice {
namespace {

using ExternalAcceptor = grpc::experimental::ExternalConnectionAcceptor;

// A connection must complete its handshake, HTTP/2 settings included, within this.
constexpr int kHandshakeTimeoutMs = 5'000;
constexpr int kKeepaliveMs = 60'000;
constexpr int kKeepaliveTimeoutMs = 20'000;
// Clients may ping as often as this without being cut off.
constexpr int kPingIntervalMinMs = 5'000;
// Descriptors that are not connections: listeners, queues, logs, model files.
constexpr rlim_t kDescriptorsReserved = 64;
constexpr char kReflectionPlugin[] = "proto_server_reflection";
// For answers that are ready but not sent when the grace is over.
constexpr std::chrono::milliseconds kFlushTime{200};

size_t ConnectionsMax(uint32_t wanted, uint32_t other_descriptors) {
  const rlim_t reserved = kDescriptorsReserved + other_descriptors;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return wanted;
  const rlim_t room =
      limit.rlim_cur > 2 * reserved ? limit.rlim_cur - reserved : limit.rlim_cur / 2;
  return std::min<size_t>(wanted, room);
}

absl::Status TlsRequired(const Endpoint& endpoint) {
  return InvalidField("listen", "TLS_REQUIRED",
                      "listen: " + endpoint.ToString() +
                          " can be reached from other hosts, which needs TLS; use a Unix socket or "
                          "a loopback address, or give certificates");
}

// Every builder of the process gets the plugin by itself.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const std::unique_ptr<grpc::ServerBuilderPlugin>& plugin) {
      return plugin->name() == kReflectionPlugin;
    });
  }
};

std::shared_ptr<grpc::ServerCredentials> CredentialsOf(const ListenAddress& address,
                                                       const std::optional<TlsFiles>& tls) {
  const bool is_unix = address.endpoint.kind == Endpoint::Kind::kUnix;
  if (tls.has_value() && !is_unix) return NewTlsCredentials(*tls);
  return LocalCredentials(is_unix, address.tenant);
}

// Waits until a queue's thread has handled everything that was in the queue before. Deletes itself
// there.
class Barrier final : public CompletionTag {
 public:
  static void Pass(grpc::ServerCompletionQueue* queue) {
    auto* const barrier = new Barrier;
    std::future<void> passed = barrier->passed_.get_future();
    barrier->alarm_.Set(queue, std::chrono::system_clock::now(),
                        static_cast<CompletionTag*>(barrier));
    passed.wait();
  }
  void Complete(bool /*ok*/) override {
    // The waiting thread goes on as soon as the value is set.
    std::promise<void> passed = std::move(passed_);
    delete this;
    passed.set_value();
  }

 private:
  Barrier() = default;
  ~Barrier() = default;
  std::promise<void> passed_;
  grpc::Alarm alarm_;
};

class GrpcServer final : public RpcServer {
 public:
  GrpcServer(std::vector<std::unique_ptr<RpcService>> services, const CallHost& host)
      : services_(std::move(services)), host_(host) {}
  ~GrpcServer() override { Shutdown(std::chrono::milliseconds(0)); }

  absl::Status Start(const RpcServerOptions& options, Transport* transport);

  const std::vector<Endpoint>& endpoints() const override { return endpoints_; }

  void SetServing(bool serving) override {
    health_.Set("", serving);
    health_.Set(kAttentionHealth, serving);
  }

  void Shutdown(std::chrono::milliseconds grace) override;

 private:
  void Configure(const RpcServerOptions& options, grpc::ServerBuilder* builder);
  void ServeQueue(grpc::ServerCompletionQueue* queue, uint32_t spin_us) const;
  void Deliver(size_t listener, FileDescriptor connection);

  const std::vector<std::unique_ptr<RpcService>> services_;
  const CallHost host_;
  grpc::AsyncGenericService other_methods_;
  HealthBoard health_;

  // Constant once started.
  std::vector<Endpoint> endpoints_;
  std::vector<std::unique_ptr<grpc::ServerCompletionQueue>> queues_;
  std::vector<std::unique_ptr<ExternalAcceptor>> acceptors_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<AcceptLoop> accept_loop_;
  std::vector<std::thread> threads_;
  bool stopped_ = false;
};

void GrpcServer::Configure(const RpcServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.message_bytes_max));
  builder->SetMaxSendMessageSize(-1);
  builder->SetResourceQuota(grpc::ResourceQuota("kvservice").Resize(options.transport_bytes_max));
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                              static_cast<int>(options.streams_per_connection_max));
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              kPingIntervalMinMs);
  for (const std::unique_ptr<RpcService>& service : services_) {
    builder->RegisterService(service->grpc_service());
  }
  builder->RegisterAsyncGenericService(&other_methods_);
  for (uint32_t i = 0; i < options.io_threads; ++i) {
    queues_.push_back(builder->AddCompletionQueue());
  }
  for (const ListenAddress& address : options.listen) {
    acceptors_.push_back(builder->experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        CredentialsOf(address, options.tls)));
  }
}

absl::Status GrpcServer::Start(const RpcServerOptions& options, Transport* transport) {
  std::vector<std::unique_ptr<Listener>> listeners;
  for (const ListenAddress& address : options.listen) {
    if (!options.tls.has_value() && !address.endpoint.IsLocal()) {
      return TlsRequired(address.endpoint);
    }
    absl::StatusOr<std::unique_ptr<Listener>> listener = transport->Listen(address.endpoint);
    if (!listener.ok()) return listener.status();
    endpoints_.push_back((*listener)->endpoint());
    listeners.push_back(*std::move(listener));
  }

  // Never undone: when its last object goes, gRPC joins a thread of its own that may be asleep for
  // ten seconds.
  grpc_init();
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  Configure(options, &builder);
  if (options.tls.has_value()) builder.SetOption(std::make_unique<WithoutReflection>());
  server_ = builder.BuildAndStart();
  if (server_ == nullptr) return absl::InternalError("gRPC refused to start a server");
  health_.Set(kLivenessHealth, true);
  SetServing(true);
  for (const std::unique_ptr<grpc::ServerCompletionQueue>& queue : queues_) {
    for (const std::unique_ptr<RpcService>& service : services_) service->Listen(queue.get());
    ListenForOtherMethods({.generic = &other_methods_, .host = &host_, .health = &health_},
                          queue.get());
    threads_.emplace_back(
        [this, queue = queue.get(), spin_us = options.spin_us] { ServeQueue(queue, spin_us); });
  }
  accept_loop_ = std::make_unique<AcceptLoop>(
      std::move(listeners),
      ConnectionLimits{.total = ConnectionsMax(options.connections_max, options.other_descriptors),
                       .per_host = options.connections_per_host_max},
      host_.clock, [this](size_t listener, FileDescriptor connection) {
        Deliver(listener, std::move(connection));
      });
  return absl::OkStatus();
}

void GrpcServer::ServeQueue(grpc::ServerCompletionQueue* queue, uint32_t spin_us) const {
  using NextStatus = grpc::CompletionQueue::NextStatus;
  SpinWindow spin(host_.clock, spin_us);
  void* tag = nullptr;
  bool ok = false;
  for (;;) {
    NextStatus status = NextStatus::TIMEOUT;
    while (status == NextStatus::TIMEOUT && spin.Wait()) {
      status = queue->AsyncNext(&tag, &ok, gpr_inf_past(GPR_CLOCK_MONOTONIC));
    }
    if (status == NextStatus::TIMEOUT && queue->Next(&tag, &ok)) status = NextStatus::GOT_EVENT;
    if (status != NextStatus::GOT_EVENT) return;
    static_cast<CompletionTag*>(tag)->Complete(ok);
    spin.Open();
  }
}

void GrpcServer::Deliver(size_t listener, FileDescriptor connection) {
  ExternalAcceptor::NewConnectionParameters parameters;
  parameters.fd = connection.Release();
  acceptors_[listener]->HandleNewConnection(&parameters);
}

void GrpcServer::Shutdown(std::chrono::milliseconds grace) {
  if (server_ == nullptr || std::exchange(stopped_, true)) return;
  accept_loop_->Stop();
  host_.in_flight->WaitUntilEmpty(grace);
  server_->Shutdown(std::chrono::system_clock::now() + kFlushTime);
  // Calls that arrived but were not looked at yet are now in the queues. Once they have been, and
  // every call has had its last event, nothing starts an operation any more and the queues may end.
  for (const std::unique_ptr<grpc::ServerCompletionQueue>& queue : queues_) {
    Barrier::Pass(queue.get());
  }
  host_.in_flight->WaitUntilEmpty();
  for (const std::unique_ptr<grpc::ServerCompletionQueue>& queue : queues_) queue->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> StartRpcServer(
    const RpcServerOptions& options, std::vector<std::unique_ptr<RpcService>> services,
    const CallHost& host, Transport* transport) {
  auto server = std::make_unique<GrpcServer>(std::move(services), host);
  const absl::Status started = server->Start(options, transport);
  if (!started.ok()) return started;
  return server;
}

}  // namespace kvservice
