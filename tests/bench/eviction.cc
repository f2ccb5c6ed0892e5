// Eviction policies on turns of chats, one-shot requests and agents, and on traces of requests.
//
// A case is a load, a lease and a size of the pool, as a share of the most that would ever be in
// memory without an end to it. Its value is what has to be brought back from disk, in percent of
// the blocks that sequences have when they are used again; its ratio how many times less than with
// LRU, where less than a tenth of a percent counts as that. Errors are half of what the value
// differs in over the seeds.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "tests/bench/eviction_load.h"
#include "tests/bench/eviction_replay.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "eviction";
constexpr char kBaseline[] = "lru";
constexpr uint64_t kMsPerMinute = 60'000;
constexpr double kPercentMin = 0.1;

struct Load {
  std::string name;
  // One for each seed.
  std::vector<std::vector<Turn>> runs;
};

struct Case {
  const Load* load = nullptr;
  uint64_t lease_ms = 0;
  uint32_t pool_percent = 0;
};

double LoadedPercent(const ReplayCost& cost) {
  return 100.0 * static_cast<double>(cost.blocks_loaded) /
         static_cast<double>(std::max<uint64_t>(1, cost.blocks_asked));
}

absl::StatusOr<std::vector<double>> Measure(const Case& one, const std::string& policy) {
  std::vector<double> percents;
  for (const std::vector<Turn>& turns : one.load->runs) {
    const auto endless = Replay(turns, one.lease_ms, UINT64_MAX / 2, kBaseline);
    if (!endless.ok()) return endless.status();
    if (endless->blocks_loaded != 0) return absl::InternalError("an endless pool had no room");
    const uint64_t capacity = std::max<uint64_t>(1, endless->blocks_max * one.pool_percent / 100);
    const auto cost = Replay(turns, one.lease_ms, capacity, policy);
    if (!cost.ok()) return cost.status();
    percents.push_back(LoadedPercent(*cost));
  }
  return percents;
}

absl::Status RunCase(const Case& one, std::vector<Row>* rows) {
  double of_lru = 0.0;
  for (const std::string& policy : EvictionPolicyNames()) {
    absl::StatusOr<std::vector<double>> percents = Measure(one, policy);
    if (!percents.ok()) return percents.status();
    const auto [least, most] = std::minmax_element(percents->begin(), percents->end());
    const double half_range = (*most - *least) / 2;
    const double median = Median(&*percents);
    if (policy == kBaseline) of_lru = median;
    rows->push_back(
        {.workload = kWorkload,
         .case_name = absl::StrFormat("%s_lease%dm_pool%d_%s", one.load->name,
                                      one.lease_ms / kMsPerMinute, one.pool_percent, policy),
         .value = median,
         .unit = "%",
         .baseline = kBaseline,
         .ratio = std::max(kPercentMin, of_lru) / std::max(kPercentMin, median),
         .error = half_range});
  }
  return absl::OkStatus();
}

void DescribeLoad(const Load& load, const std::string& parameters) {
  SequenceNumber sequences = 0;
  for (const Turn& turn : load.runs.front()) sequences = std::max(sequences, turn.sequence + 1);
  absl::PrintF("%s: %s; %d turns of %d sequences in the first of %d runs\n", load.name, parameters,
               load.runs.front().size(), sequences, load.runs.size());
}

}  // namespace

absl::Status RunEviction(const BenchOptions& options, std::vector<Row>* rows) {
  std::vector<Load> loads = {{.name = "mix", .runs = {}}};
  MixOptions mix;
  if (options.quick) mix.duration_ms = 15 * kMsPerMinute;
  for (uint64_t seed = 1; seed <= (options.quick ? 1U : 5U); ++seed) {
    loads.back().runs.push_back(MakeMix(mix, seed));
  }
  DescribeLoad(loads.back(), TextOf(mix));
  for (const std::string& path : options.request_traces) {
    absl::StatusOr<std::vector<Turn>> turns = ReadRequestTrace(path);
    if (!turns.ok()) return turns.status();
    const std::string file = path.substr(path.rfind('/') + 1);
    loads.push_back({.name = file.substr(0, file.find('.')), .runs = {*std::move(turns)}});
    DescribeLoad(loads.back(), file);
  }
  for (const Load& load : loads) {
    for (const uint64_t lease_minutes : {uint64_t{10}, uint64_t{60}}) {
      for (const uint32_t percent : {10U, 25U, 50U, 75U}) {
        const absl::Status status = RunCase(
            {.load = &load, .lease_ms = lease_minutes * kMsPerMinute, .pool_percent = percent},
            rows);
        if (!status.ok()) return status;
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace kvservice::bench
