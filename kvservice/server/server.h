// The service on the network: data side and admin side around one engine.

#ifndef KVSERVICE_KVSERVICE_SERVER_SERVER_H_
#define KVSERVICE_KVSERVICE_SERVER_SERVER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/clock.h"
#include "kvservice/engine.h"
#include "kvservice/random.h"
#include "kvservice/server/access.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/policy_registry.h"
#include "kvservice/server/tls.h"
#include "kvservice/server/transfers.h"
#include "kvservice/server/transport.h"

namespace spdlog {
class logger;
}  // namespace spdlog

namespace kvservice {

class AccessLog;

// Calls of one AttendStream with the engine at a time: two micro-batches, and the next of each.
inline constexpr uint32_t kStreamCallsMax = 4;

struct ServerOptions {
  // At least one. Unix sockets never use TLS. TCP addresses all do if `tls` is there, else they
  // must be local. Without TLS a listener's tenant owns everything created through it, and its
  // callers have all roles.
  std::vector<ListenAddress> listen;
  // Files of the certificates for TCP addresses, the admin side's too.
  std::optional<TlsFiles> tls;
  // Whom clients' certificates belong to.
  IdentityMap identities;
  // Operations: statistics, sequences of all tenants, drain. None = no admin side. As `listen`,
  // but callers need the role admin for everything.
  std::optional<Endpoint> admin_listen;
  // Metrics, a status page of them, and whether the server is alive and ready, over HTTP without
  // TLS: /metrics, /, /livez and /readyz. Numbers alone; may be an address that others reach. None
  // = not served.
  std::optional<Endpoint> metrics_listen;
  // Threads that receive and parse; the engine's threads are the device's.
  uint32_t io_threads = 1;
  // Largest message.
  size_t message_bytes_max = size_t{64} << 20;
  // All requests being served together; more is RESOURCE_EXHAUSTED / OVERLOADED with a retry delay.
  size_t requests_bytes_max = size_t{1} << 30;
  // What gRPC may use for messages on their way in.
  size_t transport_bytes_max = size_t{256} << 20;
  // Connections above it are reset.
  uint32_t connections_max = 1024;
  // The same for those that come from one address (kvservice/server/accept_loop.h).
  uint32_t connections_per_host_max = 256;
  uint32_t streams_per_connection_max = 256;
  // Lanes (kvservice/server/lane_server.h) beside the Unix sockets of `listen`; 0 = none are
  // served.
  uint32_t lanes_max = 64;
  // Shared memory of one lane.
  size_t lane_bytes_max = size_t{64} << 20;
  // Sequences that go to other servers; without targets none do. Targets must be local.
  TransferOptions transfers;
  // Time that a drain gives to calls in flight.
  uint32_t drain_grace_ms = 10'000;
  // Attends that take longer, waiting included, are logged with their stages, at most
  // kSlowCallsLoggedPerSecond; 0 = none are.
  uint32_t slow_call_ms = 1'000;
  // What requests may name.
  PolicyRegistry policies;
  // The engine's options, for GetServerInfo.
  EngineOptions engine;
};

// Borrowed; outlives the server.
struct ServerSeams {
  Clock* clock = nullptr;
  Random* random = nullptr;
  Transport* transport = nullptr;
  // nullptr = silent.
  spdlog::logger* logger = nullptr;
  // Hears of admin calls and of calls turned away; nullptr = nobody does.
  AccessLog* access_log = nullptr;
};

class Server {
 public:
  // Drains without grace if that has not been done.
  virtual ~Server() = default;
  // As bound, in the order of the options.
  virtual const std::vector<Endpoint>& endpoints() const = 0;
  virtual std::optional<Endpoint> admin_endpoint() const = 0;
  virtual std::optional<Endpoint> metrics_endpoint() const = 0;

  // Takes over what can change while calls run: the policies, identities, slow_call_ms and
  // drain_grace_ms of `options`; everything else of it is passed over. Calls that have begun keep
  // the policies they had. RESOURCE_EXHAUSTED, and nothing changed, after
  // LivePolicies::kReplacementsMax. Any thread.
  virtual absl::Status Reload(const ServerOptions& options) = 0;

  // Whom certificates belong to from the next call on, of standing connections too. Any thread.
  virtual void SetIdentities(IdentityMap identities) = 0;

  // Asks for a drain; any thread, also signal-driven ones; returns at once. The first request
  // counts. 0 = the default grace.
  virtual void RequestDrain(uint32_t grace_ms) = 0;
  // Blocks until somebody has asked; returns the grace to give.
  virtual uint32_t WaitForDrainRequest() = 0;
  // Health becomes NOT_SERVING, new calls get UNAVAILABLE / DRAINING, no connection is accepted;
  // calls in flight are given the grace and then cancelled; the engine drains; the admin side ends
  // last. Idempotent; from the thread that owns the server.
  virtual void Drain(uint32_t grace_ms) = 0;
};

// Serves `engine` (borrowed; outlives the server; Drain drains it). INVALID_ARGUMENT for options
// that contradict themselves or an address that is not local, else what listening answered.
absl::StatusOr<std::unique_ptr<Server>> NewServer(const ServerOptions& options, Engine* engine,
                                                  const ServerSeams& seams);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_SERVER_H_
