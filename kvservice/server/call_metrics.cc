#include "kvservice/server/call_metrics.h"

#include <algorithm>
#include <numeric>

namespace kvservice {

uint64_t TimeHistogram::Counts::total() const {
  return std::accumulate(counts.begin(), counts.end(), uint64_t{0});
}

void TimeHistogram::Add(uint64_t ns) {
  const auto at = std::lower_bound(kBoundsNs.begin(), kBoundsNs.end(), ns);
  counts_[static_cast<size_t>(at - kBoundsNs.begin())].fetch_add(1, std::memory_order_relaxed);
  sum_ns_.fetch_add(ns, std::memory_order_relaxed);
}

TimeHistogram::Counts TimeHistogram::Read() const {
  Counts read;
  for (size_t i = 0; i < counts_.size(); ++i) {
    read.counts[i] = counts_[i].load(std::memory_order_relaxed);
  }
  read.sum_ns = sum_ns_.load(std::memory_order_relaxed);
  return read;
}

void CallMetrics::Ended(std::string_view method, absl::StatusCode code, uint64_t duration_ns) {
  const auto known = std::find(kMethods.begin(), kMethods.end() - 1, method);
  Cell& cell = cells_[static_cast<size_t>(known - kMethods.begin())];
  const size_t index = std::min(static_cast<size_t>(code), kCodeCount - 1);
  cell.by_code[index].fetch_add(1, std::memory_order_relaxed);
  cell.time.Add(duration_ns);
}

std::vector<CallMetrics::Method> CallMetrics::Methods() const {
  std::vector<Method> methods;
  for (size_t i = 0; i < kMethods.size(); ++i) {
    Method method{.name = kMethods[i], .by_code = {}, .time = cells_[i].time.Read()};
    for (size_t code = 0; code < kCodeCount; ++code) {
      method.by_code[code] = cells_[i].by_code[code].load(std::memory_order_relaxed);
    }
    if (method.time.total() > 0) methods.push_back(method);
  }
  return methods;
}

}  // namespace kvservice
