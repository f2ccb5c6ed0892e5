// Everything that Prometheus may know about a server, in its text format (version 0.0.4). Names
// carry units; of every ratio both parts are there; no name of a tenant, a model or a sequence is.

#ifndef KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_
#define KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_

#include <cstdint>
#include <string>

#include "kvservice/engine.h"
#include "kvservice/server/call_metrics.h"
#include "kvservice/server/in_flight.h"

namespace kvservice {

// Borrowed for the call; constant numbers by value.
struct MetricsSource {
  const Engine* engine = nullptr;
  const CallMetrics* data_calls = nullptr;
  const CallMetrics* admin_calls = nullptr;
  const InFlight* data_in_flight = nullptr;
  // The engine's.
  uint32_t sequences_max = 0;
  uint32_t queue_calls_max = 0;
  uint64_t uptime_ns = 0;
  bool draining = false;
};

// Any thread.
std::string MetricsText(const MetricsSource& source);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_
