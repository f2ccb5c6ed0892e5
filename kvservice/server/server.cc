#include "kvservice/server/server.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "kvservice/engine_errors.h"
#include "kvservice/server/call.h"
#include "kvservice/server/gate.h"
#include "kvservice/server/lane_server.h"
#include "kvservice/server/rpc_server.h"
#include "kvservice/server/service.h"
#include "kvservice/server/web_pages.h"
#include "kvservice/server/web_server.h"

namespace kvservice {
namespace {

// The admin side serves few and small calls.
constexpr size_t kAdminMessageBytesMax = size_t{4} << 20;
constexpr size_t kAdminTransportBytesMax = size_t{32} << 20;
constexpr size_t kAdminRequestsBytesMax = size_t{64} << 20;
constexpr uint32_t kAdminConnectionsMax = 64;
constexpr uint32_t kAdminConnectionsPerHostMax = 32;
constexpr uint32_t kAdminStreamsMax = 32;
// The answer to the call that asked for the drain is on its way.
constexpr std::chrono::milliseconds kAdminGrace{1000};
constexpr char kAdminTenant[] = "admin";

// Protobuf cannot hold more in one message.
constexpr size_t kMessageBytesLimit = (size_t{2} << 30) - 1;

class ServerOnEngine final : public Server {
 public:
  ServerOnEngine(const ServerOptions& options, Engine* engine, const ServerSeams& seams)
      : options_(options),
        engine_(engine),
        seams_(seams),
        policies_(options.policies),
        drain_grace_ms_(options.drain_grace_ms),
        started_ns_(seams.clock->SteadyNowNs()),
        identities_(options.identities),
        data_gate_(GateOptions("data", {}, options.slow_call_ms)),
        admin_gate_(GateOptions("admin", {Role::kAdmin}, 0)),
        data_in_flight_(options.requests_bytes_max),
        admin_in_flight_(kAdminRequestsBytesMax) {}
  ~ServerOnEngine() override { Drain(0); }

  absl::Status Start();

  const std::vector<Endpoint>& endpoints() const override { return data_->endpoints(); }
  std::optional<Endpoint> admin_endpoint() const override {
    return admin_ == nullptr ? std::nullopt : std::optional(admin_->endpoints().front());
  }

  std::optional<Endpoint> metrics_endpoint() const override {
    return web_ == nullptr ? std::nullopt : std::optional(web_->endpoint());
  }

  absl::Status Reload(const ServerOptions& options) override {
    const absl::Status replaced = policies_.Replace(options.policies);
    if (!replaced.ok()) return replaced;
    identities_.Set(options.identities);
    drain_grace_ms_ = options.drain_grace_ms;
    data_gate_.set_slow_call_ms(options.slow_call_ms);
    return absl::OkStatus();
  }
  void SetIdentities(IdentityMap identities) override { identities_.Set(std::move(identities)); }

  void RequestDrain(uint32_t grace_ms) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (drain_request_.has_value()) return;
    drain_request_ = grace_ms == 0 ? drain_grace_ms_.load() : grace_ms;
    drain_requested_.notify_all();
  }

  uint32_t WaitForDrainRequest() override {
    std::unique_lock<std::mutex> lock(mutex_);
    drain_requested_.wait(lock, [this] { return drain_request_.has_value(); });
    return *drain_request_;
  }

  void Drain(uint32_t grace_ms) override;

 private:
  absl::Status StartData();
  absl::Status StartLanes();
  absl::Status StartAdmin();
  absl::Status StartWeb();
  MetricsSource Metrics() const;
  ServiceHost HostFor(CallGate* gate, InFlight* in_flight) {
    return {.calls = {.gate = gate, .in_flight = in_flight, .clock = seams_.clock},
            .engine = engine_,
            .policies = &policies_};
  }
  absl::StatusOr<AdminFacts> Facts();
  Gate::Options GateOptions(const char* side, RoleSet needed, uint32_t slow_call_ms) {
    return {.side = side,
            .needed = needed,
            .identities = &identities_,
            .clock = seams_.clock,
            .logger = seams_.logger,
            .access_log = seams_.access_log,
            .slow_call_ms = slow_call_ms};
  }

  const ServerOptions options_;
  Engine* const engine_;
  const ServerSeams seams_;
  LivePolicies policies_;
  std::atomic<uint32_t> drain_grace_ms_;
  const uint64_t started_ns_;
  Identities identities_;
  Gate data_gate_;
  Gate admin_gate_;
  InFlight data_in_flight_;
  InFlight admin_in_flight_;
  // Outlives the calls that wait for it.
  std::unique_ptr<Transfers> transfers_;
  std::unique_ptr<RpcServer> data_;
  // nullptr when none are served.
  std::unique_ptr<LaneServer> lanes_;
  std::unique_ptr<RpcServer> admin_;
  std::unique_ptr<WebServer> web_;
  bool drained_ = false;

  std::mutex mutex_;
  std::condition_variable drain_requested_;
  // Guarded by mutex_.
  std::optional<uint32_t> drain_request_;
};

absl::Status ServerOnEngine::Start() {
  if (options_.listen.empty()) return absl::InvalidArgumentError("nothing to listen on");
  if (options_.io_threads == 0) return absl::InvalidArgumentError("io_threads is 0");
  if (options_.message_bytes_max == 0 || options_.message_bytes_max > kMessageBytesLimit) {
    return absl::InvalidArgumentError("message_bytes_max is " +
                                      std::to_string(options_.message_bytes_max) +
                                      ", expected 1 to 2147483647");
  }
  if (options_.tls.has_value()) {
    if (absl::Status files = CheckTlsFiles(*options_.tls); !files.ok()) return files;
  }
  absl::Status status = StartData();
  if (status.ok()) status = StartLanes();
  if (status.ok() && options_.admin_listen.has_value()) status = StartAdmin();
  if (status.ok() && options_.metrics_listen.has_value()) status = StartWeb();
  return status;
}

absl::Status ServerOnEngine::StartData() {
  for (const ListenAddress& target : options_.transfers.targets) {
    if (target.endpoint.IsLocal()) continue;
    return absl::InvalidArgumentError("the transfer target " + target.endpoint.ToString() +
                                      " is on another host, which needs TLS");
  }
  transfers_ = NewTransfers(options_.transfers, engine_);
  ServiceHost host = HostFor(&data_gate_, &data_in_flight_);
  host.transfers = transfers_.get();
  std::vector<std::unique_ptr<RpcService>> services;
  services.push_back(NewAttentionService(host));
  services.push_back(NewSequenceService(host));
  services.push_back(NewModelService(host));
  absl::StatusOr<std::unique_ptr<RpcServer>> server =
      StartRpcServer({.listen = options_.listen,
                      .tls = options_.tls,
                      .io_threads = options_.io_threads,
                      .spin_us = options_.engine.spin_us,
                      .message_bytes_max = options_.message_bytes_max,
                      .transport_bytes_max = options_.transport_bytes_max,
                      .connections_max = options_.connections_max,
                      .connections_per_host_max = options_.connections_per_host_max,
                      .streams_per_connection_max = options_.streams_per_connection_max,
                      .other_descriptors = options_.lanes_max + kLanesOpeningMax},
                     std::move(services), host.calls, seams_.transport);
  if (!server.ok()) return server.status();
  data_ = *std::move(server);
  return absl::OkStatus();
}

absl::Status ServerOnEngine::StartLanes() {
  const bool any_unix = std::any_of(
      options_.listen.begin(), options_.listen.end(),
      [](const ListenAddress& address) { return address.endpoint.kind == Endpoint::Kind::kUnix; });
  if (!any_unix || options_.lanes_max == 0) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<LaneServer>> lanes =
      StartLaneServer({.listen = options_.listen,
                       .lanes_max = options_.lanes_max,
                       .lane_bytes_max = options_.lane_bytes_max,
                       .spin_us = options_.engine.spin_us},
                      HostFor(&data_gate_, &data_in_flight_), seams_.transport);
  if (!lanes.ok()) return lanes.status();
  lanes_ = *std::move(lanes);
  return absl::OkStatus();
}

absl::Status ServerOnEngine::StartAdmin() {
  absl::StatusOr<AdminFacts> facts = Facts();
  if (!facts.ok()) return facts.status();
  const ServiceHost host = HostFor(&admin_gate_, &admin_in_flight_);
  std::vector<std::unique_ptr<RpcService>> services;
  services.push_back(NewAdminService(host, *std::move(facts)));
  services.push_back(NewModelService(host));
  absl::StatusOr<std::unique_ptr<RpcServer>> server =
      StartRpcServer({.listen = {{.tenant = kAdminTenant, .endpoint = *options_.admin_listen}},
                      .tls = options_.tls,
                      .io_threads = 1,
                      .message_bytes_max = kAdminMessageBytesMax,
                      .transport_bytes_max = kAdminTransportBytesMax,
                      .connections_max = kAdminConnectionsMax,
                      .connections_per_host_max = kAdminConnectionsPerHostMax,
                      .streams_per_connection_max = kAdminStreamsMax},
                     std::move(services), host.calls, seams_.transport);
  if (!server.ok()) return server.status();
  admin_ = *std::move(server);
  return absl::OkStatus();
}

absl::Status ServerOnEngine::StartWeb() {
  absl::StatusOr<std::unique_ptr<WebServer>> web =
      StartWebServer(*options_.metrics_listen, PagesOf([this] { return Metrics(); }));
  if (!web.ok()) return web.status();
  web_ = *std::move(web);
  return absl::OkStatus();
}

MetricsSource ServerOnEngine::Metrics() const {
  return {.engine = engine_,
          .data_calls = &data_gate_.metrics(),
          .admin_calls = &admin_gate_.metrics(),
          .data_in_flight = &data_in_flight_,
          .sequences_max = options_.engine.sequences_max,
          .queue_calls_max = options_.engine.queue_calls_max,
          .uptime_ns = seams_.clock->SteadyNowNs() - started_ns_,
          .draining = data_gate_.closed()};
}

absl::StatusOr<AdminFacts> ServerOnEngine::Facts() {
  std::array<std::byte, sizeof(uint64_t)> epoch_bytes;
  const absl::Status random = seams_.random->Fill(absl::MakeSpan(epoch_bytes));
  if (!random.ok()) return random;
  AdminFacts facts;
  std::memcpy(&facts.epoch, epoch_bytes.data(), sizeof(facts.epoch));
  facts.started_ns = seams_.clock->SteadyNowNs();
  facts.sequence_tokens_max = options_.engine.sequence_tokens_max;
  facts.limits = {{"message_bytes_max", options_.message_bytes_max},
                  {"requests_bytes_max", options_.requests_bytes_max},
                  {"connections_max", options_.connections_max},
                  {"connections_per_host_max", options_.connections_per_host_max},
                  {"streams_per_connection_max", options_.streams_per_connection_max},
                  {"stream_calls_max", kStreamCallsMax},
                  {"lanes_max", options_.lanes_max},
                  {"lane_bytes_max", options_.lane_bytes_max},
                  {"pool_bytes", options_.engine.pool_bytes},
                  {"host_pool_bytes", options_.engine.host_pool_bytes},
                  {"sequences_max", options_.engine.sequences_max},
                  {"sequences_per_tenant_max", options_.engine.sequences_per_tenant_max},
                  {"models_max", options_.engine.models_max},
                  {"sequence_tokens_max", options_.engine.sequence_tokens_max},
                  {"prefix_tokens_per_tenant_max", options_.engine.prefix_tokens_per_tenant_max},
                  {"queue_calls_max", options_.engine.queue_calls_max},
                  {"rows_max", options_.engine.rows_max},
                  {"transfers_max", options_.transfers.transfers_max},
                  {"receives_max", options_.engine.receives_max},
                  {"lease_default_ms", options_.engine.lease_default_ms},
                  {"lease_max_ms", options_.engine.lease_max_ms},
                  {"disk_bytes_max", options_.engine.disk_bytes_max}};
  facts.draining = [this] { return data_gate_.closed(); };
  facts.request_drain = [this](uint32_t grace_ms) { RequestDrain(grace_ms); };
  return facts;
}

void ServerOnEngine::Drain(uint32_t grace_ms) {
  if (std::exchange(drained_, true)) return;
  data_gate_.Close();
  for (RpcServer* server : {data_.get(), admin_.get()}) {
    if (server != nullptr) server->SetServing(false);
  }
  // Their callers are calls in flight: what the grace leaves of them ends before it does.
  const uint64_t begin_ns = seams_.clock->SteadyNowNs();
  const std::chrono::milliseconds grace(grace_ms);
  if (transfers_ != nullptr) transfers_->Stop(grace);
  const auto waited = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::nanoseconds(seams_.clock->SteadyNowNs() - begin_ns));
  if (data_ != nullptr) data_->Shutdown(std::max(grace - waited, std::chrono::milliseconds(0)));
  // No call is left, and none is admitted any more.
  lanes_.reset();
  engine_->Drain();
  if (admin_ != nullptr) admin_->Shutdown(kAdminGrace);
  web_.reset();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> NewServer(const ServerOptions& options, Engine* engine,
                                                  const ServerSeams& seams) {
  auto server = std::make_unique<ServerOnEngine>(options, engine, seams);
  const absl::Status started = server->Start();
  if (!started.ok()) return started;
  return server;
}

}  // namespace kvservice
