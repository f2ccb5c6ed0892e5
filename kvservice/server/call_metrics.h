// Counts and times of the calls of one side of a server, by method. Any thread adds, any thread
// reads: a reader sees every number as it was at some moment, not all of one moment.

#ifndef KVSERVICE_KVSERVICE_SERVER_CALL_METRICS_H_
#define KVSERVICE_KVSERVICE_SERVER_CALL_METRICS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace kvservice {

class TimeHistogram {
 public:
  // Upper ends of the classes; one more class holds what is above the last.
  static constexpr std::array<uint64_t, 16> kBoundsNs = {
      10'000,      25'000,      50'000,        100'000,      250'000,    500'000,
      1'000'000,   2'500'000,   5'000'000,     10'000'000,   25'000'000, 50'000'000,
      100'000'000, 250'000'000, 1'000'000'000, 5'000'000'000};
  struct Counts {
    std::array<uint64_t, kBoundsNs.size() + 1> counts{};
    uint64_t sum_ns = 0;
    uint64_t total() const;
  };

  void Add(uint64_t ns);
  Counts Read() const;

 private:
  std::array<std::atomic<uint64_t>, kBoundsNs.size() + 1> counts_{};
  std::atomic<uint64_t> sum_ns_{0};
};

class CallMetrics {
 public:
  // All methods that calls are named by; anything else counts as the last.
  static constexpr std::array<std::string_view, 30> kMethods = {
      "Attend",        "AttendStream",  "Audit",
      "Append",        "Create",        "Fork",
      "Truncate",      "Get",           "Drop",
      "RenewLease",    "Suspend",       "Resume",
      "Transfer",      "Register",      "GetModel",
      "ListModels",    "OpenLane",      "GetServerInfo",
      "GetStats",      "ListSequences", "DescribeSequence",
      "DescribeBlock", "Explain",       "Evict",
      "SetQuota",      "ListTenants",   "VerifyStore",
      "Drain",         "Receive",       "Other"};
  // gRPC's, 0 to 16.
  static constexpr size_t kCodeCount = 17;

  struct Method {
    std::string_view name;
    std::array<uint64_t, kCodeCount> by_code{};
    TimeHistogram::Counts time;
  };

  void Ended(std::string_view method, absl::StatusCode code, uint64_t duration_ns);
  // Of an Attend that was answered: how long it waited for the engine, and what came then.
  void Attended(uint64_t queue_ns, uint64_t service_ns) {
    queue_time_.Add(queue_ns);
    service_time_.Add(service_ns);
  }

  // Those that have been called.
  std::vector<Method> Methods() const;
  TimeHistogram::Counts queue_time() const { return queue_time_.Read(); }
  TimeHistogram::Counts service_time() const { return service_time_.Read(); }

 private:
  struct Cell {
    std::array<std::atomic<uint64_t>, kCodeCount> by_code{};
    TimeHistogram time;
  };
  std::array<Cell, kMethods.size()> cells_;
  TimeHistogram queue_time_;
  TimeHistogram service_time_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CALL_METRICS_H_
