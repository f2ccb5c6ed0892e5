#include "kvservice/server/web_pages.h"

#include <prometheus/metric_family.h>

#include <memory>

#include "kvservice/server/status_page.h"

namespace kvservice {
namespace {

constexpr char kHtml[] = "text/html; charset=utf-8";
constexpr char kCss[] = "text/css; charset=utf-8";
constexpr char kPrometheusText[] = "text/plain; version=0.0.4; charset=utf-8";

}  // namespace

WebPages PagesOf(const std::function<MetricsSource()>& source) {
  const std::shared_ptr<StatusPage> status = NewStatusPage();
  const auto look = [source, status](uint32_t refresh_s) {
    return [source, status, refresh_s] {
      return WebPage{.content_type = kHtml, .body = status->Html(MetricsOf(source()), refresh_s)};
    };
  };
  WebPages pages;
  pages[kStatusPath] = look(kStatusRefreshS);
  pages[kStillStatusPath] = look(0);
  pages[kStatusStylePath] = [] { return WebPage{.content_type = kCss, .body = StatusStyle()}; };
  pages[kMetricsPath] = [source] {
    return WebPage{.content_type = kPrometheusText, .body = MetricsText(MetricsOf(source()))};
  };
  pages["/livez"] = [] { return WebPage{.body = "alive\n"}; };
  pages["/readyz"] = [source] {
    return source().draining ? WebPage{.status = 503, .body = "draining\n"}
                             : WebPage{.body = "ready\n"};
  };
  return pages;
}

}  // namespace kvservice
