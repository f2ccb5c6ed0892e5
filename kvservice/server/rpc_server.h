// One gRPC server with everything around it: listeners and their accept loop, completion queues and
// their threads, health, reflection, limits. The data and the admin side are one each, so that load
// on one never blocks the other.

#ifndef KVSERVICE_KVSERVICE_SERVER_RPC_SERVER_H_
#define KVSERVICE_KVSERVICE_SERVER_RPC_SERVER_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/clock.h"
#include "kvservice/server/call.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/in_flight.h"
#include "kvservice/server/service.h"
#include "kvservice/server/tls.h"
#include "kvservice/server/transport.h"

namespace kvservice {

// Names under which health is asked for, besides "" (ready to serve).
inline constexpr char kAttentionHealth[] = "kvservice.v1.AttentionService";
// The process is alive; serving until the end.
inline constexpr char kLivenessHealth[] = "kvservice.liveness";

struct RpcServerOptions {
  // TCP addresses have TLS if `tls` is there; without it all must be local.
  std::vector<ListenAddress> listen;
  std::optional<TlsFiles> tls;
  uint32_t io_threads = 1;
  // Time for which an I/O thread looks for events after each one before it sleeps.
  uint32_t spin_us = 0;
  // Largest message; gRPC refuses more with RESOURCE_EXHAUSTED before it is received.
  size_t message_bytes_max = 0;
  // What gRPC may use for receiving.
  size_t transport_bytes_max = 0;
  uint32_t connections_max = 0;
  uint32_t connections_per_host_max = 0;
  uint32_t streams_per_connection_max = 0;
  // File descriptors that the process needs besides, for something that grows.
  uint32_t other_descriptors = 0;
};

// Shutdown comes from the thread that started it; other calls from any thread.
class RpcServer {
 public:
  virtual ~RpcServer() = default;
  // As bound, in the order of the options.
  virtual const std::vector<Endpoint>& endpoints() const = 0;
  // Health of "" and of the attention service.
  virtual void SetServing(bool serving) = 0;
  // Accepts no more connections, waits up to `grace` for the calls in flight, cancels the rest,
  // ends when all are gone. Idempotent.
  virtual void Shutdown(std::chrono::milliseconds grace) = 0;
};

// Listens, serves. `host` and the seams are borrowed and outlive the server; host.in_flight is this
// server's own. INVALID_ARGUMENT / TLS_REQUIRED for an address that other hosts can reach when
// there is no TLS, else the transport's errors. Reflection, which asks nobody who he is, is served
// where there is no TLS alone.
absl::StatusOr<std::unique_ptr<RpcServer>> StartRpcServer(
    const RpcServerOptions& options, std::vector<std::unique_ptr<RpcService>> services,
    const CallHost& host, Transport* transport);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_RPC_SERVER_H_
