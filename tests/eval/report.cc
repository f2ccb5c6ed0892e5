#include "tests/eval/report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvservice::eval {
namespace {

using Json = nlohmann::ordered_json;
using Series = std::map<std::string, std::vector<double>>;

constexpr double kPercentile95 = 0.95;

// The smallest number that at least a share `quantile` of the sorted ones do not exceed.
double Quantile(const std::vector<double>& sorted, double quantile) {
  const double rank = std::ceil(quantile * static_cast<double>(sorted.size()));
  return sorted[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

double Mean(const std::vector<double>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
}

// As many digits as anybody reads.
double Rounded(double x) {
  constexpr double kGrid = 1e5;
  return std::isfinite(x) ? std::round(x * kGrid) / kGrid : x;
}

Json Summary(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return {{"count", numbers.size()},
          {"median", Rounded(Quantile(numbers, 0.5))},
          {"p95", Rounded(Quantile(numbers, kPercentile95))},
          {"max", Rounded(numbers.back())},
          {"mean", Rounded(Mean(numbers))}};
}

double ShareWithin(const std::vector<double>& numbers, double limit) {
  const auto count =
      std::count_if(numbers.begin(), numbers.end(), [limit](double x) { return x <= limit; });
  return static_cast<double>(count) / static_cast<double>(numbers.size());
}

const std::vector<double>* Find(const Series& series, const std::string& name) {
  const auto at = series.find(name);
  return at == series.end() || at->second.empty() ? nullptr : &at->second;
}

Json Tightness(const Series& series) {
  Json rows = Json::array();
  for (const char* tables : {"identity", "learnt"}) {
    for (const char* proof : {"deterministic", "sampled"}) {
      for (const char* heads : {"group", "alone"}) {
        const std::string name = absl::StrCat("slack|", tables, "|", proof, "|", heads);
        const auto* mass = Find(series, name + "|mass");
        const auto* share = Find(series, name + "|share");
        if (mass == nullptr || share == nullptr) continue;
        rows.push_back({{"tables", tables},
                        {"proof", proof},
                        {"heads", heads},
                        {"slack_of_mass", Summary(*mass)},
                        {"slack_of_share", Summary(*share)}});
      }
    }
  }
  return rows;
}

Json Costs(const Series& series) {
  std::vector<std::pair<std::string, double>> limits;
  for (const double limit : kMassLimits) limits.emplace_back("mass", limit);
  for (const double limit : kOutputLimits) limits.emplace_back("output", limit);
  Json rows = Json::array();
  for (const auto& [kind, limit] : limits) {
    for (const char* heads : {"group", "alone"}) {
      const std::string name = absl::StrFormat("|%s %g|%s", kind, limit, heads);
      const auto* bytes = Find(series, "bytes" + name);
      if (bytes == nullptr) continue;
      Json row = {{"limit", kind},
                  {"value", limit},
                  {"heads", heads},
                  {"bytes", Summary(*bytes)},
                  {"rows_read", Summary(*Find(series, "read" + name))},
                  {"samples", Summary(*Find(series, "samples" + name))},
                  {"share_within_quarter", Rounded(ShareWithin(*bytes, kCheapShare))},
                  {"share_sampled", Rounded(Mean(*Find(series, "sampled" + name)))},
                  {"share_dense", Rounded(Mean(*Find(series, "dense" + name)))},
                  {"share_met", Rounded(Mean(*Find(series, "met" + name)))}};
      const auto* oracle = Find(series, "oracle" + name);
      if (oracle != nullptr) row["oracle"] = Summary(*oracle);
      rows.push_back(row);
    }
  }
  return rows;
}

Json Shape(const TraceResult& result) {
  const TraceHeader& header = result.header;
  return {{"model", header.model},
          {"tokens", header.token_count},
          {"layers", header.layers.size()},
          {"query_heads", header.layout.query_head_count},
          {"kv_heads", header.layout.kv_head_count},
          {"head_dim", header.layout.head_dim}};
}

Json Entry(const TraceResult& result, const std::string& name, const std::string& tables_from,
           size_t trace_count) {
  Json entry = {{"name", name}, {"traces", trace_count}};
  entry.update(Shape(result));
  entry["queries"] = result.query_count;
  entry["tables_from"] = tables_from;
  entry["certificates"] = result.certificates;
  entry["certificates_sampled"] = result.sampled_certificates;
  entry["wrong_statements"] = result.wrong;
  entry["wrong_statements_sampled"] = result.wrong_sampled;
  entry["tightness"] = Tightness(result.series);
  entry["costs"] = Costs(result.series);
  return entry;
}

void Pool(const TraceResult& from, TraceResult* to) {
  to->query_count += from.query_count;
  to->certificates += from.certificates;
  to->sampled_certificates += from.sampled_certificates;
  to->wrong += from.wrong;
  to->wrong_sampled += from.wrong_sampled;
  for (const auto& [name, numbers] : from.series) {
    std::vector<double>& all = to->series[name];
    all.insert(all.end(), numbers.begin(), numbers.end());
  }
}

void AppendJson(const Json& value, int depth, std::string* text) {
  constexpr int kDepthMax = 4;
  if (!value.is_structured() || value.empty() || depth == kDepthMax) {
    *text += value.dump();
    return;
  }
  *text += value.is_object() ? "{" : "[";
  const std::string indent(static_cast<size_t>(depth) + 1, ' ');
  const char* separator = "\n";
  for (const auto& [key, item] : value.items()) {
    absl::StrAppend(text, separator, indent);
    if (value.is_object()) absl::StrAppend(text, Json(key).dump(), ": ");
    AppendJson(item, depth + 1, text);
    separator = ",\n";
  }
  absl::StrAppend(text, "\n", indent.substr(1), value.is_object() ? "}" : "]");
}

std::string Text(const Json& field) { return field.get<std::string>(); }

std::string Slack(const Json& summary) {
  return absl::StrFormat("%.2f / %.2f / %.2f", summary["median"].get<double>(),
                         summary["p95"].get<double>(), summary["max"].get<double>());
}

std::string TightnessRows(const Json& entries) {
  std::string page;
  for (const Json& entry : entries) {
    for (const char* heads : {"alone", "group"}) {
      absl::StrAppend(&page, "| ", Text(entry["name"]), " | ", heads);
      for (const char* tables : {"identity", "learnt"}) {
        for (const char* proof : {"deterministic", "sampled"}) {
          const auto row = std::find_if(
              entry["tightness"].begin(), entry["tightness"].end(), [&](const Json& r) {
                return r["tables"] == tables && r["proof"] == proof && r["heads"] == heads;
              });
          absl::StrAppend(&page, " | ",
                          row == entry["tightness"].end() ? "-" : Slack((*row)["slack_of_mass"]));
        }
      }
      absl::StrAppend(&page, " |\n");
    }
  }
  return page;
}

std::string CostRows(const Json& entry, const std::string& kind) {
  std::string page;
  for (const Json& row : entry["costs"]) {
    if (Text(row["limit"]) != kind) continue;
    const std::string oracle = row.contains("oracle")
                                   ? absl::StrFormat("%.3f", row["oracle"]["median"].get<double>())
                                   : "-";
    absl::StrAppendFormat(&page, "| %s | %g | %s | %s | %.3f | %.3f | %.3f | %.0f %% | %.0f %% |\n",
                          Text(entry["name"]), row["value"].get<double>(), Text(row["heads"]),
                          oracle, row["bytes"]["median"].get<double>(),
                          row["bytes"]["mean"].get<double>(), row["bytes"]["p95"].get<double>(),
                          100.0 * row["share_within_quarter"].get<double>(),
                          100.0 * row["share_dense"].get<double>());
  }
  return page;
}

}  // namespace

Json MakeReport(const std::vector<TraceResult>& results, const std::string& device) {
  Json report = {{"device", device},
                 {"tightness",
                  {{"kept_share", kTightnessShare},
                   {"draws", kTightnessDraws},
                   {"failure_probability", kTightnessEta}}}};
  report["traces"] = Json::array();
  std::vector<std::pair<std::string, std::pair<TraceResult, size_t>>> pools;
  for (const TraceResult& result : results) {
    report["traces"].push_back(Entry(result, result.header.name, result.tables_from, 1));
    const std::string name = absl::StrCat(result.header.model, "-", result.header.token_count);
    auto at =
        std::find_if(pools.begin(), pools.end(), [&](const auto& p) { return p.first == name; });
    if (at == pools.end()) {
      pools.emplace_back(name, std::make_pair(TraceResult{}, 0));
      at = pools.end() - 1;
      at->second.first.header = result.header;
    }
    Pool(result, &at->second.first);
    ++at->second.second;
  }
  report["all_texts"] = Json::array();
  uint64_t wrong = 0;
  for (const auto& [name, pool] : pools) {
    report["all_texts"].push_back(Entry(pool.first, name, "another text each", pool.second));
    wrong += pool.first.wrong + pool.first.wrong_sampled;
  }
  report["wrong_statements"] = wrong;
  return report;
}

std::string MakeJsonText(const Json& report) {
  std::string text;
  AppendJson(report, 0, &text);
  return text + "\n";
}

std::string MakePage(const Json& report, const std::string& command) {
  uint64_t certificates = 0;
  for (const Json& entry : report["all_texts"]) {
    certificates += entry["certificates"].get<uint64_t>();
  }
  std::string page = absl::StrFormat(
      "# Certificates on traces of real attention\n\n"
      "Made by `%s`; do not edit. %d certificates of the %s device were compared with long double "
      "truth; wrong statements: %d.\n\n"
      "Sketch tables are learnt from another text than the one they are judged on.\n\n"
      "## Tightness\n\n"
      "ln(bound / truth) of the dropped mass in nats with %.0f %% of the tokens kept: median / p95 "
      "/ max over all layers, query heads and judged queries. Sampled: %d draws, failure "
      "probability %g. Heads: one selection for each query head alone, or one for all query heads "
      "of "
      "a KV head, as the service makes it. Heads that drop less than %g are left out.\n\n"
      "| trace | heads | identity tables, deterministic | sampled | learnt tables, deterministic | "
      "sampled |\n|---|---|---|---|---|---|\n",
      command, certificates, Text(report["device"]), report["wrong_statements"].get<uint64_t>(),
      100.0 * report["tightness"]["kept_share"].get<double>(),
      report["tightness"]["draws"].get<uint32_t>(),
      report["tightness"]["failure_probability"].get<double>(), kTightnessLeastShare);
  absl::StrAppend(&page, TightnessRows(report["traces"]), TightnessRows(report["all_texts"]));
  for (const std::string kind : {"mass", "output"}) {
    absl::StrAppend(
        &page, "\n## Bytes to certify a limit on ",
        kind == "mass" ? "dropped mass" : "the output error (relative to the largest value norm)",
        "\n\nFraction of the bytes of dense attention: sketches, rows and sampled keys. Oracle: "
        "rows of the smallest set that meets the limit, its mass known for free.\n\n"
        "| texts | limit | heads | oracle median | median | mean | p95 | within a quarter | dense "
        "|\n|---|---|---|---|---|---|---|---|---|\n");
    for (const Json& entry : report["all_texts"]) absl::StrAppend(&page, CostRows(entry, kind));
  }
  return page;
}

}  // namespace kvservice::eval
