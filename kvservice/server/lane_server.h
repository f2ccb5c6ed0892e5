// Opens lanes (wire/lane_layout.h) and serves all of them with one thread, beside the Unix sockets
// that gRPC serves. Whoever may connect to the socket may open a lane, which then belongs to the
// listener's tenant; it ends with its connection.

#ifndef KVSERVICE_KVSERVICE_SERVER_LANE_SERVER_H_
#define KVSERVICE_KVSERVICE_SERVER_LANE_SERVER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/server/service.h"
#include "kvservice/server/transport.h"

namespace kvservice {

// Connections that may be on their way to becoming lanes.
inline constexpr uint32_t kLanesOpeningMax = 64;

struct LaneServerOptions {
  // The data side's; those that are no Unix sockets are passed over.
  std::vector<ListenAddress> listen;
  // More are RESOURCE_EXHAUSTED / LANES_EXHAUSTED.
  uint32_t lanes_max = 0;
  // Memory of one lane.
  size_t lane_bytes_max = 0;
  // Time for which the thread looks for requests after each one before it sleeps.
  uint32_t spin_us = 0;
};

class LaneServer {
 public:
  // Opens no more lanes and closes all. Their calls must have ended, and no new ones be admitted.
  virtual ~LaneServer() = default;
};

// Listens and starts the thread. `host` and the transport are borrowed and outlive the server and
// all calls. INVALID_ARGUMENT for a path that becomes too long, else the transport's errors.
absl::StatusOr<std::unique_ptr<LaneServer>> StartLaneServer(const LaneServerOptions& options,
                                                            const ServiceHost& host,
                                                            Transport* transport);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_LANE_SERVER_H_
