// A small HTTP/1.1 server for pages that are read by scrapers and people: GET and HEAD, no TLS, no
// scripts, nothing from elsewhere and in nobody's frame (the policy is sent with every page).
// Bounded: kWebThreads requests at a time, a few more connections wait.

#ifndef KVSERVICE_KVSERVICE_SERVER_WEB_SERVER_H_
#define KVSERVICE_KVSERVICE_SERVER_WEB_SERVER_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvservice/server/endpoint.h"

namespace kvservice {

inline constexpr int kWebThreads = 4;

struct WebPage {
  int status = 200;
  const char* content_type = "text/plain; charset=utf-8";
  std::string body;
};

// Path ("/metrics") to what makes the page, on a thread of the server's.
using WebPages = std::map<std::string, std::function<WebPage()>>;

class WebServer {
 public:
  // Finishes what is being answered.
  virtual ~WebServer() = default;
  // As bound: with the port that port 0 became.
  virtual const Endpoint& endpoint() const = 0;
};

// INVALID_ARGUMENT for an endpoint that is not TCP, UNAVAILABLE if it cannot be listened on. Other
// paths are 404, other methods 405.
absl::StatusOr<std::unique_ptr<WebServer>> StartWebServer(const Endpoint& endpoint, WebPages pages);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_WEB_SERVER_H_
