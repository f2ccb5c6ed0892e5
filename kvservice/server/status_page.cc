#include "kvservice/server/status_page.h"

#include <prometheus/metric_family.h>

#include <array>
#include <cmath>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "kvservice/server/figures.h"

namespace kvservice {
namespace {

constexpr char kNoValue[] = "<span class=\"none\">&ndash;</span>";

std::string Escaped(const std::string& text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

// ---- Numbers for people
// --------------------------------------------------------------------------

using Format = std::string (*)(double value);

std::string Plain(double value) { return absl::StrFormat("%.3g", value); }

// 1,234,567
std::string Whole(double value) {
  std::string text = absl::StrFormat("%.0f", value);
  const size_t first = text.starts_with('-') ? 1 : 0;
  for (size_t i = text.size(); i > first + 3;) text.insert(i -= 3, 1, ',');
  return text;
}

std::string Bytes(double value) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; value >= 1024.0 && unit + 1 < kUnits.size(); ++unit) value /= 1024.0;
  return absl::StrFormat("%.*f %s", unit == 0 ? 0 : 1, value, kUnits[unit]);
}

std::string Duration(double seconds) {
  if (seconds < 1e-3) return absl::StrFormat("%.0f µs", seconds * 1e6);
  if (seconds < 1.0) return absl::StrFormat("%.1f ms", seconds * 1e3);
  if (seconds < 60.0) return absl::StrFormat("%.1f s", seconds);
  const auto minutes = static_cast<uint64_t>(seconds / 60.0);
  if (minutes < 60) return absl::StrFormat("%u min %.0f s", minutes, std::fmod(seconds, 60.0));
  if (minutes < 24 * 60) return absl::StrFormat("%u h %u min", minutes / 60, minutes % 60);
  return absl::StrFormat("%u d %u h", minutes / (24 * 60), minutes / 60 % 24);
}

std::string PerSecond(double value) { return value < 100.0 ? Plain(value) : Whole(value); }

std::string Percent(double value) { return absl::StrFormat("%.1f %%", value * 100.0); }

std::string Number(const Figure& figure, Format format) {
  if (!std::isfinite(figure.value)) return kNoValue;
  return absl::StrFormat("<data value=\"%.17g\" title=\"%s\">%s</data>", figure.value,
                         Escaped(figure.expression), format(figure.value));
}

// ---- Tables
// --------------------------------------------------------------------------------------

using Cells = std::vector<std::string>;

// `heads` are our own words, or none; cells are HTML. The first cell of a row is its name.
std::string Table(const char* caption, const std::vector<const char*>& heads,
                  const std::vector<Cells>& rows) {
  std::string html = absl::StrCat("<section><h2>", caption, "</h2>");
  if (rows.empty()) return html + "<p class=\"none\">None yet.</p></section>\n";
  absl::StrAppend(&html, "<div class=\"wide\"><table>");
  if (!heads.empty()) absl::StrAppend(&html, "<thead><tr>");
  for (const char* const head : heads) absl::StrAppend(&html, "<th scope=\"col\">", head, "</th>");
  absl::StrAppend(&html, heads.empty() ? "<tbody>\n" : "</tr></thead><tbody>\n");
  for (const Cells& cells : rows) {
    absl::StrAppend(&html, "<tr><th scope=\"row\">", cells.front(), "</th>");
    for (size_t i = 1; i < cells.size(); ++i) absl::StrAppend(&html, "<td>", cells[i], "</td>");
    absl::StrAppend(&html, "</tr>\n");
  }
  return html + "</tbody></table></div></section>\n";
}

std::string Meter(const Figure& used, const Figure& limit) {
  if (!(limit.value > 0.0)) return kNoValue;
  const double share = used.value / limit.value;
  return absl::StrFormat("<meter min=\"0\" max=\"1\" high=\"0.9\" value=\"%.4f\">%s</meter>", share,
                         Percent(share));
}

std::string ServerTable(const MetricFamilies& now) {
  const auto build = [&](const char* label) {
    const auto values = LabelValues(now, "kvservice_build_info", label);
    return values.empty() ? std::string(kNoValue) : Escaped(values.front());
  };
  const auto sum = [&](const char* name, Format format) {
    return Number(SumOf(now, name), format);
  };
  return Table("Server", {},
               {{"Version", build("version")},
                {"Build", build("build")},
                {"Device", build("device")},
                {"Instruction set", build("instruction_set")},
                {"Up for", sum("kvservice_uptime_seconds", Duration)},
                {"Processor time", sum("process_cpu_seconds_total", Duration)},
                {"Resident memory", sum("process_resident_memory_bytes", Bytes)},
                {"Calls in flight", sum("kvservice_requests_in_flight", Whole)},
                {"Calls that came to the engine", sum("kvservice_engine_calls_total", Whole)},
                {"Of them refused: queue full", sum("kvservice_engine_calls_shed_total", Whole)},
                {"Leases that expired", sum("kvservice_leases_expired_total", Whole)},
                {"Tokens of prompts", sum("kvservice_prefix_requested_tokens_total", Whole)},
                {"Of them there already", sum("kvservice_prefix_matched_tokens_total", Whole)}});
}

std::string RoomTable(const MetricFamilies& now) {
  std::vector<Cells> rows;
  const auto of = [&](const char* what, const char* used_name, const char* limit_name,
                      Format format) {
    const Figure used = SumOf(now, used_name);
    const Figure limit = SumOf(now, limit_name);
    rows.push_back({what, Number(used, format), Number(limit, format), Meter(used, limit)});
  };
  const auto alone = [&](const char* what, const Figure& used, Format format) {
    rows.push_back({what, Number(used, format), kNoValue, kNoValue});
  };
  const Figure sequences = SumOf(now, "kvservice_sequences");
  const Figure on_disk = SumOf(now, "kvservice_disk_sequences");
  of("Memory", "kvservice_pool_used_bytes", "kvservice_pool_bytes", Bytes);
  of("Memory: the host's part", "kvservice_host_pool_used_bytes", "kvservice_host_pool_bytes",
     Bytes);
  alone("Blocks in memory", SumOf(now, "kvservice_blocks_used"), Whole);
  alone("Sequences in memory", Difference(sequences, on_disk), Whole);
  of("Disk: rows of sequences", "kvservice_disk_used_bytes", "kvservice_disk_max_bytes", Bytes);
  alone("Disk: files", SumOf(now, "kvservice_disk_file_bytes"), Bytes);
  alone("Sequences on disk alone", on_disk, Whole);
  alone("Sequences that the disk lost", SumOf(now, "kvservice_disk_lost_sequences"), Whole);
  of("Sequences, wherever they are", "kvservice_sequences", "kvservice_sequences_max", Whole);
  of("Calls that wait", "kvservice_queue_calls", "kvservice_queue_calls_max", Whole);
  of("Requests in flight", "kvservice_request_bytes_in_flight", "kvservice_request_bytes_max",
     Bytes);
  of("Descriptors", "process_open_fds", "process_max_fds", Whole);
  return Table("Room", {"", "used", "limit", "share"}, rows);
}

std::string ModelTable(const MetricFamilies& now) {
  constexpr char kFamily[] = "kvservice_model_shapes";
  constexpr std::array<const char*, 8> kLabels = {"layers",    "query_heads",     "kv_heads",
                                                  "head_dim",  "dtype",           "selector",
                                                  "guarantee", "max_dropped_mass"};
  std::vector<Cells> rows;
  for (const prometheus::MetricFamily& family : now) {
    if (family.name != kFamily) continue;
    for (const prometheus::ClientMetric& metric : family.metric) {
      MetricLabels labels;
      for (const auto& label : metric.label) labels.emplace_back(label.name, label.value);
      Cells cells;
      for (const char* const wanted : kLabels) {
        const auto values = LabelValues({family}, kFamily, wanted, labels);
        cells.push_back(values.empty() ? kNoValue : Escaped(values.front()));
      }
      cells.push_back(Number(SumOf(now, kFamily, labels), Whole));
      rows.push_back(std::move(cells));
    }
  }
  return Table("Models: shape and default policy",
               {"layers", "query heads", "KV heads", "head dim", "type", "selector", "guarantee",
                "dropped mass, most", "models"},
               rows);
}

// ---- Speeds
// --------------------------------------------------------------------------------------

// What there is, and what came to it in the last seconds.
struct Lately {
  const MetricFamilies& now;
  const MetricFamilies& since;
  double seconds;
};

// Median and 99 % of times, lately and since the start.
void AddTimes(const Lately& lately, const std::string& family, const MetricLabels& labels,
              Cells* cells) {
  constexpr std::array<double, 2> kShares = {0.5, 0.99};
  for (const double share : kShares) {
    cells->push_back(
        Number(Quantile(lately.since, family, labels, share, lately.seconds), Duration));
  }
  for (const double share : kShares) {
    cells->push_back(Number(Quantile(lately.now, family, labels, share), Duration));
  }
}

std::string CallTable(const Lately& lately) {
  constexpr char kCalls[] = "kvservice_rpc_calls_total";
  constexpr char kTimes[] = "kvservice_rpc_duration_seconds";
  std::vector<Cells> rows;
  for (const std::string& side : LabelValues(lately.now, kTimes, "side")) {
    for (const std::string& method : LabelValues(lately.now, kTimes, "method", {{"side", side}})) {
      const MetricLabels labels = {{"side", side}, {"method", method}};
      MetricLabels served = labels;
      served.emplace_back("code", "OK");
      const Figure all = SumOf(lately.now, kCalls, labels);
      const Figure good = SumOf(lately.now, kCalls, served);
      // Without a single good call there is no such series.
      const Figure failed = std::isnan(good.value) ? all : Difference(all, good);
      Cells cells = {Escaped(absl::StrCat(side, " ", method)), Number(all, Whole),
                     Number(failed, Whole),
                     Number(Rate(lately.since, kCalls, labels, lately.seconds), PerSecond)};
      AddTimes(lately, kTimes, labels, &cells);
      rows.push_back(std::move(cells));
    }
  }
  return Table("Calls",
               {"", "ended", "failed", "per second", "50 %, lately", "99 %, lately",
                "50 %, since start", "99 %, since start"},
               rows);
}

std::string FailureTable(const MetricFamilies& now) {
  constexpr char kCalls[] = "kvservice_rpc_calls_total";
  std::vector<Cells> rows;
  for (const std::string& code : LabelValues(now, kCalls, "code")) {
    if (code == "OK") continue;
    rows.push_back({Escaped(code), Number(SumOf(now, kCalls, {{"code", code}}), Whole)});
  }
  return Table("Calls that failed", {"", "calls"}, rows);
}

std::string StageTable(const Lately& lately) {
  Cells waiting = {"Waiting for the engine"};
  Cells working = {"Working"};
  AddTimes(lately, "kvservice_attend_queue_seconds", {}, &waiting);
  AddTimes(lately, "kvservice_attend_service_seconds", {}, &working);
  return Table("Stages of an Attend",
               {"", "50 %, lately", "99 %, lately", "50 %, since start", "99 %, since start"},
               {waiting, working});
}

// ---- Attention
// -----------------------------------------------------------------------------------

std::string AttentionTable(const MetricFamilies& now) {
  const auto row = [&](const char* what, const char* part_name, const char* whole_name) -> Cells {
    const Figure part = SumOf(now, part_name);
    const Figure whole = SumOf(now, whole_name);
    return {what, Number(part, Whole), Number(whole, Whole), Number(Ratio(part, whole), Percent)};
  };
  constexpr char kVisible[] = "kvservice_attend_tokens_visible_total";
  constexpr char kGroups[] = "kvservice_attend_groups_total";
  return Table(
      "Attention", {"", "count", "of", "share"},
      {row("Tokens read, of those stored", "kvservice_attend_tokens_read_total", kVisible),
       row("Keys sampled for certificates", "kvservice_attend_keys_sampled_total", kVisible),
       row("KV heads that scanned", "kvservice_attend_groups_scanned_total", kGroups),
       row("KV heads that read everything", "kvservice_attend_groups_dense_total", kGroups)});
}

std::string CertificateTable(const MetricFamilies& now, const char* caption, const char* family,
                             const char* label) {
  std::vector<Cells> rows;
  const Figure all = SumOf(now, family);
  for (const std::string& value : LabelValues(now, family, label)) {
    const Figure count = SumOf(now, family, {{label, value}});
    rows.push_back({Escaped(value), Number(count, Whole), Number(Ratio(count, all), Percent)});
  }
  return Table(caption, {"", "certificates", "share"}, rows);
}

std::string MassTable(const MetricFamilies& now) {
  constexpr char kCertified[] = "kvservice_dropped_mass_certified";
  constexpr char kAudited[] = "kvservice_dropped_mass_audited";
  constexpr std::array<double, 4> kBounds = {0.01, 0.05, 0.1, 0.5};
  std::vector<Cells> rows;
  for (const std::string& selector : LabelValues(now, kCertified, "selector")) {
    const MetricLabels labels = {{"selector", selector}};
    const Figure count = CountOf(now, kCertified, labels);
    Cells cells = {Escaped(selector), Number(count, Whole)};
    for (const double bound : kBounds) {
      cells.push_back(Number(Ratio(AtMost(now, kCertified, labels, bound), count), Percent));
    }
    for (const char* const family : {kCertified, kAudited}) {
      cells.push_back(
          Number(Ratio(TotalOf(now, family, labels), CountOf(now, family, labels)), Plain));
    }
    rows.push_back(std::move(cells));
  }
  return Table("Dropped mass: bounds, by selector",
               {"", "bounds", "&le; 0.01", "&le; 0.05", "&le; 0.1", "&le; 0.5", "mean bound",
                "mean truth, audited"},
               rows);
}

std::string AuditTable(const MetricFamilies& now) {
  std::vector<Cells> rows;
  const auto add = [&](const std::string& what, const Figure& figure, Format format) {
    rows.push_back({what, Number(figure, format)});
  };
  for (const char* const outcome : {"audited", "cancelled", "skipped"}) {
    add(absl::StrCat("Rows ", outcome),
        SumOf(now, "kvservice_audit_rows_total", {{"outcome", outcome}}), Whole);
  }
  add("Rows waiting", SumOf(now, "kvservice_audit_rows_waiting"), Whole);
  add("Certificates compared", SumOf(now, "kvservice_audit_certificates_total"), Whole);
  add("Wrong though proven", SumOf(now, "kvservice_audit_violations_total"), Whole);
  add("Wrong by chance", SumOf(now, "kvservice_audit_misses_total"), Whole);
  add("What chance explains of them", SumOf(now, "kvservice_audit_expected_misses_total"), Plain);
  add("Wrong among all given, expected",
      SumOf(now, "kvservice_certificates_failure_probability_total"), Plain);
  for (const auto& [share, what] : {std::pair{"0.5", "half"}, std::pair{"0.95", "95 %"}}) {
    add(absl::StrCat("ln(bound / truth), ", what, " at most"),
        SumOf(now, "kvservice_audit_slack_nats", {{"share", share}}), Plain);
  }
  return Table("Audit", {}, rows);
}

// ---- The whole
// -----------------------------------------------------------------------------------

// What an operator must know first; empty = all is well.
std::vector<std::string> Troubles(const MetricFamilies& now) {
  std::vector<std::string> troubles;
  const auto if_any = [&](const char* name, const char* what) {
    if (SumOf(now, name).value > 0.0) troubles.emplace_back(what);
  };
  const auto if_full = [&](const char* used, const char* limit, const char* what) {
    const double most = SumOf(now, limit).value;
    if (most > 0.0 && SumOf(now, used).value >= most) troubles.emplace_back(what);
  };
  if_any("kvservice_draining",
         "Not serving: a drain has begun. Calls that have started are finished, new ones are "
         "refused.");
  if_any("kvservice_audit_violations_total",
         "The audit found certificates that were proven and wrong: a defect of the service.");
  if_any("kvservice_disk_failed",
         "A write to the disk has failed: nothing is written there any more, memory goes on.");
  if_any("kvservice_disk_lost_sequences", "The disk lost or damaged sequences.");
  if_full("kvservice_sequences", "kvservice_sequences_max",
          "There are as many sequences as there may be: new ones are refused.");
  if_full("kvservice_queue_calls", "kvservice_queue_calls_max",
          "The engine's queue is full: calls are refused.");
  return troubles;
}

std::string Head(const MetricFamilies& now, uint32_t refresh_s) {
  const bool serving = !(SumOf(now, "kvservice_draining").value > 0.0);
  const std::vector<std::string> troubles = Troubles(now);
  const char* const health = !serving ? "not serving" : troubles.empty() ? "serving" : "in trouble";
  const char* const health_class = !serving ? "bad" : troubles.empty() ? "good" : "poor";
  std::string html = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n";
  if (refresh_s > 0) {
    absl::StrAppend(&html, "<meta http-equiv=\"refresh\" content=\"", refresh_s, "\">\n");
  }
  absl::StrAppend(&html,
                  "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
                  "<meta name=\"color-scheme\" content=\"light dark\">\n<title>KVService: ",
                  health, "</title>\n<link rel=\"icon\" href=\"data:,\">\n<link rel=\"stylesheet\"",
                  " href=\"", kStatusStylePath, "\"></head>\n<body><header><h1>KVService</h1>",
                  "<p id=\"health\" class=\"", health_class, "\">", health, "</p><nav>");
  if (refresh_s > 0) {
    absl::StrAppend(&html, "<a href=\"", kStillStatusPath, "\">hold still</a> ");
  } else {
    absl::StrAppend(&html, "<a href=\"", kStatusPath, "\">follow</a> ");
  }
  absl::StrAppend(&html, "<a href=\"", kMetricsPath, "\">metrics</a></nav></header>\n<main>\n");
  if (troubles.empty()) return html;
  absl::StrAppend(&html, "<ul id=\"troubles\">");
  for (const std::string& trouble : troubles) absl::StrAppend(&html, "<li>", trouble, "</li>");
  return html + "</ul>\n";
}

class StatusPageWithLooks final : public StatusPage {
 public:
  std::string Html(const MetricFamilies& now, uint32_t refresh_s) override {
    const double uptime_s = SumOf(now, "kvservice_uptime_seconds").value;
    const Look before = LookBefore(now, uptime_s);
    const MetricFamilies since = Since(SpeedsIn(now), before.speeds);
    const Lately lately{.now = now, .since = since, .seconds = uptime_s - before.uptime_s};
    std::string html = Head(now, refresh_s);
    absl::StrAppend(&html, ServerTable(now), RoomTable(now), ModelTable(now), CallTable(lately),
                    StageTable(lately));
    absl::StrAppend(&html, FailureTable(now), AttentionTable(now), MassTable(now));
    absl::StrAppend(&html,
                    CertificateTable(now, "Certificates, by what they rest on",
                                     "kvservice_certificates_total", "level"),
                    CertificateTable(now, "Certificates, by how the KV head was answered",
                                     "kvservice_certificates_by_action_total", "action"),
                    AuditTable(now));
    absl::StrAppend(
        &html, "</main>\n<footer><p>&ldquo;Lately&rdquo;: the last ", Duration(lately.seconds),
        ". All other numbers are those of <a href=\"", kMetricsPath,
        "\">/metrics</a>; a "
        "number&rsquo;s title is its expression in PromQL.</p></footer></body></html>\n");
    return html;
  }

 private:
  // What the page was made of at a time.
  struct Look {
    double uptime_s = 0.0;
    MetricFamilies speeds;
  };
  // Looks closer than this are one, so that there are at most a dozen.
  static constexpr double kApartS = 5.0;

  // The oldest one of the window, or the start. Keeps what is now for later.
  Look LookBefore(const MetricFamilies& now, double uptime_s) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!looks_.empty() && looks_.front().uptime_s < uptime_s - kStatusWindowS) {
      looks_.pop_front();
    }
    // Two readers may come here in another order than the one in which they read.
    const bool is_later = !looks_.empty() && looks_.front().uptime_s < uptime_s;
    Look before = is_later ? looks_.front() : Look{};
    if (looks_.empty() || uptime_s - looks_.back().uptime_s >= kApartS) {
      looks_.push_back({.uptime_s = uptime_s, .speeds = SpeedsIn(now)});
    }
    return before;
  }

  std::mutex mutex_;
  // Guarded by mutex_; oldest first.
  std::deque<Look> looks_;
};

}  // namespace

std::unique_ptr<StatusPage> NewStatusPage() { return std::make_unique<StatusPageWithLooks>(); }

const char* StatusStyle() {
  return R"(:root {
  color-scheme: light dark;
  --text: #1b1f24; --soft: #57606a; --ground: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --link: #0550ae; --good: #116329; --poor: #7d4e00; --bad: #a40e26;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6edf3; --soft: #9da7b3; --ground: #0d1117; --card: #161b22; --line: #30363d;
    --link: #79b8ff; --good: #56d364; --poor: #e3b341; --bad: #ff9492;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--text);
  background: var(--ground); font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1rem; margin: 0 0 .4rem; }
nav { margin-left: auto; }
nav a { margin-left: .8rem; }
a { color: var(--link); }
#health { font-weight: 600; margin: .5rem 0; }
.good { color: var(--good); }
.poor { color: var(--poor); }
.bad, #troubles { color: var(--bad); }
.none, thead th, tbody th { color: var(--soft); }
main { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
#troubles { flex: 1 0 100%; margin: 0; font-weight: 600; }
section { flex: 1 0 auto; max-width: 100%; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 0 .15rem 1rem; text-align: right; white-space: nowrap;
  font-weight: 400; }
tr > :first-child { padding-left: 0; text-align: left; }
thead th { font-size: .85rem; }
tbody tr { border-top: 1px solid var(--line); }
td { color: var(--text); }
meter { width: 6rem; }
footer { color: var(--soft); font-size: .85rem; }
)";
}

}  // namespace kvservice
