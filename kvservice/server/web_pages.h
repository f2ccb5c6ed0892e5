// What the metrics listener serves: numbers for scrapers and for people, and probes. It has no
// identity to ask for, so all of it is for whoever can connect.

#ifndef KVSERVICE_KVSERVICE_SERVER_WEB_PAGES_H_
#define KVSERVICE_KVSERVICE_SERVER_WEB_PAGES_H_

#include <cstdint>
#include <functional>

#include "kvservice/server/metrics_text.h"
#include "kvservice/server/web_server.h"

namespace kvservice {

// How often the status page loads itself again.
inline constexpr uint32_t kStatusRefreshS = 10;

// /metrics, the status page with its style sheet, /livez and /readyz. `source` is called on the web
// server's threads, and what it borrows outlives the pages.
WebPages PagesOf(const std::function<MetricsSource()>& source);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_WEB_PAGES_H_
