// The status page is /metrics for people: the same numbers, whatever they are, and markup of nobody
// else's.

#include "kvservice/server/status_page.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <cmath>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "kvservice/server/figures.h"

namespace kvservice::testing {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricType;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

using Labels = std::vector<ClientMetric::Label>;

void Gauge(const char* name, double value, MetricFamilies* families, Labels labels = {}) {
  ClientMetric metric;
  metric.label = std::move(labels);
  metric.gauge.value = value;
  families->push_back(
      {.name = name, .help = "", .type = MetricType::Gauge, .metric = {std::move(metric)}});
}

// counts: of the classes up to 1, 2 and 4 seconds, and above.
ClientMetric Times(Labels labels, std::vector<uint64_t> counts) {
  constexpr std::array<double, 3> kBounds = {1.0, 2.0, 4.0};
  ClientMetric metric;
  metric.label = std::move(labels);
  for (size_t i = 0; i < counts.size(); ++i) {
    metric.histogram.sample_count += counts[i];
    if (i == kBounds.size()) break;
    metric.histogram.bucket.push_back(
        {.cumulative_count = metric.histogram.sample_count, .upper_bound = kBounds[i]});
  }
  return metric;
}

Labels Attend() { return {{"side", "data"}, {"method", "Attend"}}; }

// A server that has answered so many Attends.
MetricFamilies After(double uptime_s, double calls, std::vector<uint64_t> times) {
  MetricFamilies families;
  Gauge("kvservice_uptime_seconds", uptime_s, &families);
  ClientMetric counted;
  counted.label = Attend();
  counted.label.push_back({"code", "OK"});
  counted.counter.value = calls;
  families.push_back({.name = "kvservice_rpc_calls_total",
                      .help = "",
                      .type = MetricType::Counter,
                      .metric = {counted}});
  families.push_back({.name = "kvservice_rpc_duration_seconds",
                      .help = "",
                      .type = MetricType::Histogram,
                      .metric = {Times(Attend(), std::move(times))}});
  return families;
}

std::string Unescaped(std::string text) {
  const std::map<std::string, std::string> entities = {
      {"&quot;", "\""}, {"&lt;", "<"}, {"&gt;", ">"}, {"&#39;", "'"}};
  for (const auto& [entity, plain] : entities) {
    text = std::regex_replace(text, std::regex(entity), plain);
  }
  return std::regex_replace(text, std::regex("&amp;"), "&");
}

// Expression to value, of every number of a page.
std::map<std::string, double> NumbersOn(const std::string& html) {
  std::map<std::string, double> numbers;
  const std::regex data("<data value=\"([^\"]*)\" title=\"([^\"]*)\">");
  for (std::sregex_iterator at(html.begin(), html.end(), data), end; at != end; ++at) {
    numbers[Unescaped((*at)[2])] = std::stod((*at)[1]);
  }
  return numbers;
}

TEST(FiguresTest, QuantilesAreThoseOfPrometheus) {
  const MetricFamilies families = After(10.0, 10.0, {2, 6, 2, 0});
  const auto quantile = [&](double share) {
    return Quantile(families, "kvservice_rpc_duration_seconds", {}, share).value;
  };
  EXPECT_DOUBLE_EQ(quantile(0.1), 0.5) << "half of the first class, which begins at zero";
  EXPECT_DOUBLE_EQ(quantile(0.5), 1.5) << "three of the six of the second class";
  EXPECT_DOUBLE_EQ(quantile(0.9), 3.0);
  EXPECT_DOUBLE_EQ(quantile(1.0), 4.0);
  const MetricFamilies slow = After(10.0, 4.0, {0, 0, 0, 4});
  EXPECT_DOUBLE_EQ(Quantile(slow, "kvservice_rpc_duration_seconds", {}, 0.5).value, 4.0)
      << "nobody knows how long: the last end";
  const MetricFamilies gap = After(10.0, 2.0, {1, 0, 1, 0});
  EXPECT_DOUBLE_EQ(Quantile(gap, "kvservice_rpc_duration_seconds", {}, 0.75).value, 3.0);
}

TEST(FiguresTest, NothingIsNotZero) {
  const MetricFamilies families = After(10.0, 0.0, {0, 0, 0, 0});
  EXPECT_TRUE(std::isnan(Quantile(families, "kvservice_rpc_duration_seconds", {}, 0.5).value));
  EXPECT_TRUE(std::isnan(Quantile(families, "no_such_family", {}, 0.5).value));
  EXPECT_TRUE(std::isnan(SumOf(families, "no_such_family").value));
  EXPECT_TRUE(std::isnan(SumOf(families, "kvservice_rpc_calls_total", {{"side", "admin"}}).value));
  const Figure none = SumOf(families, "kvservice_rpc_calls_total");
  EXPECT_TRUE(std::isnan(Ratio(none, none).value)) << "a share of nothing";
  EXPECT_TRUE(std::isnan(AtMost(families, "kvservice_rpc_duration_seconds", {}, 1.5).value))
      << "no end of a class";
}

TEST(FiguresTest, ExpressionsSelectWhatWasAdded) {
  const MetricFamilies families = After(10.0, 7.0, {3, 4, 0, 0});
  const MetricLabels labels = {{"method", "a\"b\\c"}};
  EXPECT_EQ(SumOf(families, "x", labels).expression, R"(sum(x{method="a\"b\\c"}))");
  EXPECT_EQ(AtMost(families, "x", labels, 0.05).expression,
            R"(sum(x_bucket{method="a\"b\\c",le="0.05"}))");
  EXPECT_EQ(Quantile(families, "x", {}, 0.5).expression,
            "histogram_quantile(0.5, sum by (le) (x_bucket))");
  EXPECT_EQ(Quantile(families, "x", {}, 0.5, 30.0).expression,
            "histogram_quantile(0.5, sum by (le) (rate(x_bucket[30s])))");
  EXPECT_EQ(Rate(families, "x", {}, 30.0).expression, "sum(rate(x[30s]))");
  EXPECT_THAT(LabelValues(families, "kvservice_rpc_calls_total", "code"), ElementsAre("OK"));
}

TEST(StatusPageTest, NumbersAreThoseOfTheMetrics) {
  MetricFamilies families = After(4000.0, 10.0, {2, 6, 2, 0});
  Gauge("kvservice_pool_used_bytes", 0.1 + 0.2, &families);
  Gauge("kvservice_pool_bytes", 3 << 20, &families);
  Gauge("kvservice_sequences", 1'234'567, &families);
  Gauge("kvservice_disk_sequences", 67, &families);
  const std::string html = NewStatusPage()->Html(families, 0);
  const std::map<std::string, double> numbers = NumbersOn(html);
  EXPECT_EQ(numbers.at("sum(kvservice_pool_used_bytes)"), 0.1 + 0.2) << "to the last bit";
  EXPECT_EQ(numbers.at("sum(kvservice_pool_bytes)"), 3 << 20);
  EXPECT_EQ(numbers.at("sum(kvservice_sequences) - sum(kvservice_disk_sequences)"), 1'234'500);
  EXPECT_EQ(numbers.at("histogram_quantile(0.5, sum by (le) (kvservice_rpc_duration_seconds_bucket"
                       "{side=\"data\",method=\"Attend\"}))"),
            1.5);
  for (const char* const text : {">3.0 MiB<", ">1,234,567<", ">1 h 6 min<", ">1.5 s<"}) {
    EXPECT_THAT(html, HasSubstr(text));
  }
}

TEST(StatusPageTest, SpeedsAreThoseOfTheLastMinute) {
  const std::unique_ptr<StatusPage> page = NewStatusPage();
  constexpr char kWhich[] = "kvservice_rpc_calls_total{side=\"data\",method=\"Attend\"}";
  constexpr char kTimes[] =
      "kvservice_rpc_duration_seconds_bucket{side=\"data\",method=\"Attend\"}";
  const auto per_second = [&](const MetricFamilies& now, const std::string& window) {
    return NumbersOn(page->Html(now, 0)).at("sum(rate(" + (kWhich + window) + "))");
  };
  EXPECT_EQ(per_second(After(100.0, 200.0, {200, 0, 0, 0}), "[100s]"), 2.0) << "since the start";
  EXPECT_EQ(per_second(After(130.0, 500.0, {200, 0, 300, 0}), "[30s]"), 10.0);
  const std::string html = page->Html(After(140.0, 500.0, {200, 0, 300, 0}), 0);
  const std::map<std::string, double> numbers = NumbersOn(html);
  const std::string median =
      "histogram_quantile(0.5, sum by (le) (rate(" + (kTimes + std::string("[40s])))"));
  EXPECT_EQ(numbers.at(median), 3.0);
  EXPECT_THAT(html, HasSubstr("the last 40.0 s"));
  // The look at 100 s has left the window.
  EXPECT_EQ(per_second(After(190.0, 1100.0, {800, 0, 300, 0}), "[60s]"), 10.0);
  EXPECT_EQ(per_second(After(1000.0, 2000.0, {1700, 0, 300, 0}), "[1000s]"), 2.0)
      << "nobody looked for long";
}

TEST(StatusPageTest, LooksAtOneMomentDoNotDivideByIt) {
  const std::unique_ptr<StatusPage> page = NewStatusPage();
  const MetricFamilies now = After(100.0, 200.0, {200, 0, 0, 0});
  const std::string once = page->Html(now, 0);
  EXPECT_EQ(page->Html(now, 0), once);
  // A reader that was overtaken by another one.
  for (const auto& [expression, value] :
       NumbersOn(page->Html(After(99.0, 198.0, {198, 0, 0, 0}), 0))) {
    EXPECT_GE(value, 0.0) << expression;
  }
}

TEST(StatusPageTest, NamesAreNeverMarkup) {
  const std::string hostile = "</title><script>alert('x')</script>\"onload=\"&amp;<b a=\"";
  MetricFamilies families;
  Gauge("kvservice_build_info", 1.0, &families,
        {{"version", hostile},
         {"build", hostile},
         {"device", hostile},
         {"instruction_set", hostile}});
  Gauge("kvservice_model_shapes", 1.0, &families,
        {{"layers", hostile}, {"dtype", hostile}, {"selector", hostile}});
  ClientMetric call;
  call.label = {{"side", hostile}, {"method", hostile}, {"code", hostile}};
  families.push_back({.name = "kvservice_rpc_calls_total",
                      .help = "",
                      .type = MetricType::Counter,
                      .metric = {call}});
  ClientMetric time = Times({{"side", hostile}, {"method", hostile}}, {1, 0, 0, 0});
  families.push_back({.name = "kvservice_rpc_duration_seconds",
                      .help = "",
                      .type = MetricType::Histogram,
                      .metric = {time}});
  for (const auto& [family, label] : {std::pair{"kvservice_certificates_total", "level"},
                                      std::pair{"kvservice_certificates_by_action_total", "action"},
                                      std::pair{"kvservice_dropped_mass_certified", "selector"}}) {
    ClientMetric one = Times({{label, hostile}}, {1, 0, 0, 0});
    families.push_back({.name = family, .help = "", .type = MetricType::Counter, .metric = {one}});
  }
  const std::string html = NewStatusPage()->Html(families, 10);
  // Every name is shown, as it is.
  const std::string shown = "&lt;/title&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;";
  size_t count = 0;
  for (size_t at = 0; (at = html.find(shown, at)) != std::string::npos; ++at) ++count;
  EXPECT_GE(count, 4U + 3U + 2U + 1U + 3U);
  EXPECT_THAT(html, AllOf(Not(HasSubstr("<script")), Not(HasSubstr("onload=\"")),
                          Not(HasSubstr("<b ")), Not(HasSubstr("alert('"))));
}

TEST(StatusPageTest, WhatIsWrongComesFirst) {
  const auto html_with = [](const std::map<std::string, double>& gauges) {
    MetricFamilies families = After(10.0, 1.0, {1, 0, 0, 0});
    for (const auto& [name, value] : gauges) Gauge(name.c_str(), value, &families);
    return NewStatusPage()->Html(families, 0);
  };
  EXPECT_THAT(html_with({}), AllOf(HasSubstr("class=\"good\">serving<"), Not(HasSubstr("<li>"))));
  EXPECT_THAT(html_with({{"kvservice_draining", 1.0}}),
              AllOf(HasSubstr("class=\"bad\">not serving<"), HasSubstr("<li>Not serving: a drain "),
                    HasSubstr("<title>KVService: not serving</title>")));
  for (const auto& [gauge, words] : std::map<std::string, std::string>{
           {"kvservice_audit_violations_total", "proven and wrong"},
           {"kvservice_disk_failed", "A write to the disk has failed"},
           {"kvservice_disk_lost_sequences", "lost or damaged"}}) {
    EXPECT_THAT(html_with({{gauge, 1.0}}),
                AllOf(HasSubstr("class=\"poor\">in trouble<"), HasSubstr(words)));
    EXPECT_THAT(html_with({{gauge, 0.0}}), HasSubstr("class=\"good\">serving<"));
  }
  EXPECT_THAT(html_with({{"kvservice_sequences", 8.0}, {"kvservice_sequences_max", 8.0}}),
              HasSubstr("as many sequences as there may be"));
  EXPECT_THAT(html_with({{"kvservice_queue_calls", 7.0}, {"kvservice_queue_calls_max", 8.0}}),
              Not(HasSubstr("queue is full")));
}

TEST(StatusPageTest, LoadsItselfAgainIfItShall) {
  const MetricFamilies families = After(10.0, 1.0, {1, 0, 0, 0});
  const std::unique_ptr<StatusPage> page = NewStatusPage();
  EXPECT_THAT(page->Html(families, 10),
              AllOf(HasSubstr("http-equiv=\"refresh\" content=\"10\""), HasSubstr("\"/status\"")));
  EXPECT_THAT(page->Html(families, 0), AllOf(Not(HasSubstr("http-equiv")), HasSubstr("\"/\"")));
}

TEST(StatusPageTest, AnEmptyServerHasAPage) {
  EXPECT_THAT(NewStatusPage()->Html({}, 0), AllOf(HasSubstr("None yet."), HasSubstr("</html>")));
}

}  // namespace
}  // namespace kvservice::testing
