// Everything that Prometheus may know about a server, in its text format (version 0.0.4). Names
// carry units; of every ratio both parts are there; no name of a tenant, a model or a sequence is;
// of models their shapes are.

#ifndef KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_
#define KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kvservice/engine.h"
#include "kvservice/server/call_metrics.h"
#include "kvservice/server/in_flight.h"

namespace prometheus {
struct MetricFamily;
}  // namespace prometheus

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

using MetricFamilies = std::vector<prometheus::MetricFamily>;

// What every page shows is made of these and of nothing else. Any thread.
MetricFamilies MetricsOf(const MetricsSource& source);

// Any thread.
std::string MetricsText(const MetricFamilies& families);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_METRICS_TEXT_H_
