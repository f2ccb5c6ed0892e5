#include "kvservice/server/web_server.h"

#include <arpa/inet.h>
#include <civetweb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <future>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/server/transport.h"

namespace kvservice {
namespace {

// A request's line and headers; more is answered 413 by the library.
constexpr char kRequestBytesMax[] = "8192";
// For a request to come and for its answer to be taken.
constexpr char kRequestTimeoutMs[] = "10000";

// Style sheets come from here, the empty icon from the page itself, and nothing else at all.
constexpr char kContentPolicy[] =
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'";

constexpr std::chrono::milliseconds kKnockEvery{10};

// Connects to whoever listens there, without waiting, and goes away.
void Knock(const Endpoint& endpoint) {
  sockaddr_storage storage{};
  socklen_t length = 0;
  auto* const v4 = reinterpret_cast<sockaddr_in*>(&storage);
  auto* const v6 = reinterpret_cast<sockaddr_in6*>(&storage);
  if (inet_pton(AF_INET, endpoint.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(endpoint.port);
    length = sizeof(*v4);
  } else if (inet_pton(AF_INET6, endpoint.host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(endpoint.port);
    length = sizeof(*v6);
  }
  const FileDescriptor knocking(
      socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (knocking.get() < 0) return;
  [[maybe_unused]] const int heard =
      connect(knocking.get(), reinterpret_cast<const sockaddr*>(&storage), length);
}

const char* StatusText(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 405:
      return "Method Not Allowed";
    case 503:
      return "Service Unavailable";
    default:
      return "Not Found";
  }
}

class CivetServerOnPages final : public WebServer {
 public:
  CivetServerOnPages(Endpoint endpoint, WebPages pages)
      : endpoint_(std::move(endpoint)), pages_(std::move(pages)) {}
  // The library's thread looks every two seconds whether it shall stop, or when somebody connects.
  ~CivetServerOnPages() override {
    if (context_ == nullptr) return;
    const std::future<void> stopped = std::async(std::launch::async, [this] { mg_stop(context_); });
    while (stopped.wait_for(kKnockEvery) != std::future_status::ready) Knock(endpoint_);
  }

  absl::Status Start() {
    const std::string address = endpoint_.ToString();
    const std::string threads = absl::StrCat(kWebThreads);
    const char* options[] = {"listening_ports",
                             address.c_str(),
                             "num_threads",
                             threads.c_str(),
                             "max_request_size",
                             kRequestBytesMax,
                             "request_timeout_ms",
                             kRequestTimeoutMs,
                             "enable_auth_domain_check",
                             "no",
                             nullptr};
    const mg_callbacks callbacks{};
    context_ = mg_start(&callbacks, nullptr, options);
    if (context_ == nullptr) {
      return absl::UnavailableError(absl::StrCat("cannot listen on ", address));
    }
    mg_server_port port{};
    if (mg_get_server_ports(context_, 1, &port) == 1) {
      endpoint_.port = static_cast<uint16_t>(port.port);
    }
    mg_set_request_handler(context_, "/**", &CivetServerOnPages::Handle, this);
    return absl::OkStatus();
  }

  const Endpoint& endpoint() const override { return endpoint_; }

 private:
  static int Handle(mg_connection* connection, void* self) {
    return static_cast<const CivetServerOnPages*>(self)->Answer(connection);
  }

  WebPage PageOf(const mg_request_info& request) const {
    const std::string_view method = request.request_method;
    if (method != "GET" && method != "HEAD") return {.status = 405, .body = "GET or HEAD only\n"};
    const auto page = pages_.find(request.local_uri);
    if (page == pages_.end()) return {.status = 404, .body = "there is no such page\n"};
    return page->second();
  }

  int Answer(mg_connection* connection) const {
    const mg_request_info* const request = mg_get_request_info(connection);
    const WebPage page = PageOf(*request);
    const std::string head = absl::StrCat(
        "HTTP/1.1 ", page.status, " ", StatusText(page.status),
        "\r\nContent-Type: ", page.content_type, "\r\nContent-Length: ", page.body.size(),
        "\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff"
        "\r\nReferrer-Policy: no-referrer\r\nContent-Security-Policy: ",
        kContentPolicy, "\r\nConnection: close\r\n\r\n");
    mg_write(connection, head.data(), head.size());
    const bool with_body = std::string_view(request->request_method) != "HEAD";
    if (with_body) mg_write(connection, page.body.data(), page.body.size());
    return page.status;
  }

  Endpoint endpoint_;
  const WebPages pages_;
  mg_context* context_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WebServer>> StartWebServer(const Endpoint& endpoint,
                                                          WebPages pages) {
  if (endpoint.kind != Endpoint::Kind::kTcp) {
    return absl::InvalidArgumentError(absl::StrCat(endpoint.ToString(), " is not HOST:PORT"));
  }
  auto server = std::make_unique<CivetServerOnPages>(endpoint, std::move(pages));
  const absl::Status status = server->Start();
  if (!status.ok()) return status;
  return server;
}

}  // namespace kvservice
