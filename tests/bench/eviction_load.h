// Who uses which sequence when, for `kvbench --workload=eviction`: made up, or read from a trace of
// requests. A use is a turn: a prompt and the tokens that follow it, not a single step.

#ifndef KVSERVICE_TESTS_BENCH_EVICTION_LOAD_H_
#define KVSERVICE_TESTS_BENCH_EVICTION_LOAD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/bench/eviction_policy.h"

namespace kvservice::bench {

struct Turn {
  uint64_t time_ms = 0;
  SequenceNumber sequence = 0;
  // Tokens that the sequence has after it.
  uint64_t tokens = 0;
  // The sequence was forked from this one at its first turn.
  std::optional<SequenceNumber> parent = std::nullopt;
  // The caller drops the sequence after it; else it is left to its lease.
  bool is_last = false;
};

// Chats with time to think in between, bursts of requests that come once, and long agents that fork
// now and then. Rates are of all together; times are log-normal.
struct MixOptions {
  uint64_t duration_ms = 2 * 3600 * 1000;
  double chats_per_minute = 4.0;
  double chat_turns_mean = 6.0;
  double think_median_s = 40.0;
  double think_sigma = 1.2;
  double bursts_per_minute = 0.5;
  uint32_t burst_requests_max = 80;
  double agents_per_minute = 0.5;
  double agent_steps_mean = 40.0;
  double tool_median_s = 4.0;
  double tool_sigma = 1.5;
  double fork_share = 0.1;
  // Of sequences that are dropped when they have ended; the others are left to their leases.
  double dropped_share = 0.5;
};
// Ordered by time.
std::vector<Turn> MakeMix(const MixOptions& options, uint64_t seed);
std::string TextOf(const MixOptions& options);

// Lines of {"timestamp": ms, "input_length": N, "output_length": N, "hash_ids": [...]}, where an id
// stands for a prefix of 512 tokens more, as those published with Mooncake (Qin and others, FAST
// 2025). A request whose prompt has the whole of an earlier one's, but for its last ids, goes on
// with that sequence; any other begins one.
absl::StatusOr<std::vector<Turn>> ReadRequestTrace(const std::string& path);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_EVICTION_LOAD_H_
