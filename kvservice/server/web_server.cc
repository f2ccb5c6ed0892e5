#include "kvservice/server/web_server.h"

#include <civetweb.h>

#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

// A request's line and headers; more is answered 413 by the library.
constexpr char kRequestBytesMax[] = "8192";
// For a request to come and for its answer to be taken.
constexpr char kRequestTimeoutMs[] = "10000";

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
  ~CivetServerOnPages() override {
    if (context_ != nullptr) mg_stop(context_);
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
        "\r\nConnection: close\r\n\r\n");
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
