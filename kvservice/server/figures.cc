#include "kvservice/server/figures.h"

#include <prometheus/metric_family.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace kvservice {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;

constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();

const MetricFamily* Find(const MetricFamilies& families, std::string_view name) {
  const auto found = std::find_if(families.begin(), families.end(),
                                  [&](const MetricFamily& one) { return one.name == name; });
  return found == families.end() ? nullptr : &*found;
}

bool Matches(const ClientMetric& metric, const MetricLabels& labels) {
  return std::all_of(labels.begin(), labels.end(), [&](const auto& wanted) {
    return std::any_of(metric.label.begin(), metric.label.end(), [&](const auto& label) {
      return label.name == wanted.first && label.value == wanted.second;
    });
  });
}

// The sum of `number` over what matches.
double Add(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
           const std::function<double(const ClientMetric&)>& number) {
  const MetricFamily* const family = Find(families, name);
  if (family == nullptr) return kNothing;
  double sum = 0.0;
  bool any = false;
  for (const ClientMetric& metric : family->metric) {
    if (!Matches(metric, labels)) continue;
    sum += number(metric);
    any = true;
  }
  return any ? sum : kNothing;
}

// {a="b",c="d"}
std::string Selector(const MetricLabels& labels) {
  if (labels.empty()) return "";
  std::string text = "{";
  for (const auto& [name, value] : labels) {
    const std::string escaped =
        absl::StrReplaceAll(value, {{"\\", "\\\\"}, {"\"", "\\\""}, {"\n", "\\n"}});
    absl::StrAppend(&text, text.size() > 1 ? "," : "", name, "=\"", escaped, "\"");
  }
  return text + "}";
}

std::string SumExpression(const std::string& name, const MetricLabels& labels) {
  return absl::StrCat("sum(", name, Selector(labels), ")");
}

std::string RateExpression(const std::string& series, double window_s) {
  return absl::StrFormat("rate(%s[%.0fs])", series, std::ceil(window_s));
}

double Below(const ClientMetric::Histogram& histogram, double bound) {
  for (const ClientMetric::Bucket& bucket : histogram.bucket) {
    if (bucket.upper_bound == bound) return static_cast<double>(bucket.cumulative_count);
  }
  return kNothing;
}

// The numbers of `metric` become what came after `before`.
void Subtract(const ClientMetric& before, ClientMetric* metric) {
  metric->counter.value -= before.counter.value;
  metric->histogram.sample_count -= before.histogram.sample_count;
  metric->histogram.sample_sum -= before.histogram.sample_sum;
  const size_t buckets = std::min(metric->histogram.bucket.size(), before.histogram.bucket.size());
  for (size_t i = 0; i < buckets; ++i) {
    metric->histogram.bucket[i].cumulative_count -= before.histogram.bucket[i].cumulative_count;
  }
}

}  // namespace

Figure SumOf(const MetricFamilies& families, const std::string& name, const MetricLabels& labels) {
  const MetricFamily* const family = Find(families, name);
  const bool is_gauge = family != nullptr && family->type == prometheus::MetricType::Gauge;
  return {.value = Add(families, name, labels,
                       [is_gauge](const ClientMetric& metric) {
                         return is_gauge ? metric.gauge.value : metric.counter.value;
                       }),
          .expression = SumExpression(name, labels)};
}

Figure CountOf(const MetricFamilies& families, const std::string& name,
               const MetricLabels& labels) {
  return {.value = Add(families, name, labels,
                       [](const ClientMetric& metric) {
                         return static_cast<double>(metric.histogram.sample_count);
                       }),
          .expression = SumExpression(name + "_count", labels)};
}

Figure TotalOf(const MetricFamilies& families, const std::string& name,
               const MetricLabels& labels) {
  return {
      .value = Add(families, name, labels,
                   [](const ClientMetric& metric) { return metric.histogram.sample_sum; }),
      .expression = SumExpression(name + "_sum", labels),
  };
}

Figure AtMost(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
              double bound) {
  MetricLabels with_bound = labels;
  with_bound.emplace_back("le", absl::StrCat(bound));
  return {
      .value = Add(families, name, labels,
                   [bound](const ClientMetric& metric) { return Below(metric.histogram, bound); }),
      .expression = SumExpression(name + "_bucket", with_bound)};
}

Figure Quantile(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
                double share, double window_s) {
  const std::string buckets = name + "_bucket" + Selector(labels);
  Figure figure{.value = kNothing,
                .expression = absl::StrCat(
                    "histogram_quantile(", share, ", sum by (le) (",
                    window_s > 0.0 ? RateExpression(buckets, window_s) : buckets, "))")};
  const double count = CountOf(families, name, labels).value;
  if (!(count > 0.0)) return figure;
  const double rank = share * count;
  double lower_bound = 0.0;
  double lower_count = 0.0;
  // All histograms of a family have the same classes.
  for (const ClientMetric::Bucket& bucket : Find(families, name)->metric.front().histogram.bucket) {
    const double upper_count = AtMost(families, name, labels, bucket.upper_bound).value;
    if (upper_count >= rank && upper_count > lower_count) {
      figure.value = lower_bound + (bucket.upper_bound - lower_bound) * (rank - lower_count) /
                                       (upper_count - lower_count);
      return figure;
    }
    lower_bound = bucket.upper_bound;
    lower_count = upper_count;
  }
  figure.value = lower_bound;
  return figure;
}

Figure Rate(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
            double window_s) {
  const double increase = SumOf(families, name, labels).value;
  return {
      .value = window_s > 0.0 ? increase / window_s : kNothing,
      .expression = absl::StrCat("sum(", RateExpression(name + Selector(labels), window_s), ")"),
  };
}

Figure Difference(const Figure& a, const Figure& b) {
  return {.value = a.value - b.value, .expression = a.expression + " - " + b.expression};
}

Figure Ratio(const Figure& part, const Figure& whole) {
  return {.value = whole.value == 0.0 ? kNothing : part.value / whole.value,
          .expression = part.expression + " / " + whole.expression};
}

std::vector<std::string> LabelValues(const MetricFamilies& families, const std::string& name,
                                     const std::string& label, const MetricLabels& labels) {
  std::vector<std::string> values;
  const MetricFamily* const family = Find(families, name);
  if (family == nullptr) return values;
  for (const ClientMetric& metric : family->metric) {
    if (!Matches(metric, labels)) continue;
    for (const ClientMetric::Label& one : metric.label) {
      const bool is_new = std::find(values.begin(), values.end(), one.value) == values.end();
      if (one.name == label && is_new) values.push_back(one.value);
    }
  }
  return values;
}

MetricFamilies SpeedsIn(const MetricFamilies& families) {
  MetricFamilies speeds;
  for (const MetricFamily& family : families) {
    const bool is_stage =
        family.name.starts_with("kvservice_attend_") && family.name.ends_with("_seconds");
    if (is_stage || family.name.starts_with("kvservice_rpc_")) speeds.push_back(family);
  }
  return speeds;
}

MetricFamilies Since(MetricFamilies families, const MetricFamilies& before) {
  for (MetricFamily& family : families) {
    const MetricFamily* const old = Find(before, family.name);
    if (old == nullptr) continue;
    for (ClientMetric& metric : family.metric) {
      const auto same =
          std::find_if(old->metric.begin(), old->metric.end(),
                       [&](const ClientMetric& one) { return one.label == metric.label; });
      if (same != old->metric.end()) Subtract(*same, &metric);
    }
  }
  return families;
}

}  // namespace kvservice
