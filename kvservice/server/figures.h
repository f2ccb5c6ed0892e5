// Numbers made from metrics for people to read, each with the PromQL expression that gives the same
// number: the home of these formulas, and of none besides them.

#ifndef KVSERVICE_KVSERVICE_SERVER_FIGURES_H_
#define KVSERVICE_KVSERVICE_SERVER_FIGURES_H_

#include <string>
#include <utility>
#include <vector>

#include "kvservice/server/metrics_text.h"

namespace kvservice {

struct Figure {
  // NaN where there is nothing to tell: no such series, or a share of nothing.
  double value;
  std::string expression;
};

// Label names to values; a series matches if it has them all.
using MetricLabels = std::vector<std::pair<std::string, std::string>>;

// All borrow `families` for the call. Any thread.

// Sum of gauges or counters.
Figure SumOf(const MetricFamilies& families, const std::string& name,
             const MetricLabels& labels = {});
// Of all observations of the matching histograms: how many, and their sum.
Figure CountOf(const MetricFamilies& families, const std::string& name,
               const MetricLabels& labels = {});
Figure TotalOf(const MetricFamilies& families, const std::string& name,
               const MetricLabels& labels = {});
// How many are at most `bound`, which is the upper end of a class.
Figure AtMost(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
              double bound);
// Linear between the ends of a class, as Prometheus does it; above the last end that end.
// `families` are those of the last window_s (Since); 0 = since the start.
Figure Quantile(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
                double share, double window_s = 0.0);
// Counts per second, of families of the last window_s.
Figure Rate(const MetricFamilies& families, const std::string& name, const MetricLabels& labels,
            double window_s);

Figure Difference(const Figure& a, const Figure& b);
Figure Ratio(const Figure& part, const Figure& whole);

// All values of a label in a family, in the order in which they come.
std::vector<std::string> LabelValues(const MetricFamilies& families, const std::string& name,
                                     const std::string& label, const MetricLabels& labels = {});

// The counters and histograms of the families called kvservice_rpc_* and kvservice_attend_*_seconds
// alone: what speeds are made of.
MetricFamilies SpeedsIn(const MetricFamilies& families);
// What came to them after `before`.
MetricFamilies Since(MetricFamilies families, const MetricFamilies& before);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_FIGURES_H_
