// What an operator sees of a server in a browser: /metrics as tables, with what is wrong on top. No
// number is here that is not made of those (kvservice/server/figures.h), so the page tells nobody
// more than they do; every number is a <data> element with the raw value, and its expression as the
// title. Plain HTML: no script, nothing from elsewhere.

#ifndef KVSERVICE_KVSERVICE_SERVER_STATUS_PAGE_H_
#define KVSERVICE_KVSERVICE_SERVER_STATUS_PAGE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "kvservice/server/metrics_text.h"

namespace kvservice {

// Where it links to: itself, itself without a refresh, its style sheet, the metrics.
inline constexpr char kStatusPath[] = "/";
inline constexpr char kStillStatusPath[] = "/status";
inline constexpr char kStatusStylePath[] = "/status.css";
inline constexpr char kMetricsPath[] = "/metrics";
// What "lately" is at most.
inline constexpr uint32_t kStatusWindowS = 60;

class StatusPage {
 public:
  virtual ~StatusPage() = default;
  // HTML, as now. Speeds are those since the oldest look that was taken in the last kStatusWindowS,
  // or since the start if none was. refresh_s = 0: the page stays as it is. Any thread.
  virtual std::string Html(const MetricFamilies& now, uint32_t refresh_s) = 0;
};

std::unique_ptr<StatusPage> NewStatusPage();

// The style sheet: light and dark.
const char* StatusStyle();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_STATUS_PAGE_H_
