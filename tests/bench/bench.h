// What every workload of kvbench shares. A workload measures its cases and their baselines in the
// same process run, alternating, and checks results against an oracle while it measures; figures
// are medians. Adding one: write <name>.cc with a `Run<Name>` function, declare it in
// workloads.h and add one line to workloads.cc.

#ifndef KVSERVICE_TESTS_BENCH_BENCH_H_
#define KVSERVICE_TESTS_BENCH_BENCH_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace kvservice::bench {

struct BenchOptions {
  // Small sizes and few repetitions: a smoke test of the workload and its checks.
  bool quick = false;
  uint32_t thread_count = 0;  // 0 = one per CPU
  std::string device = "cpu";
  // Files of tests/eval/trace.py, for the workloads that replay real models.
  std::vector<std::string> traces = {};
  // Sequences of each of them; empty: decode_e2e's own.
  std::vector<uint32_t> trace_batches = {};
  // How the calls of decode_e2e travel: some of auto, unary, stream and lane, which take turns.
  std::vector<std::string> transports = {"auto"};
  // Of decode_e2e, by their names without numbers ("certified", "scan"); empty: all.
  std::vector<std::string> cases = {};
  // Sizes of the planted data of decode_e2e, as "sequences x tokens"; empty: its own.
  std::vector<std::string> sizes = {};
  // The server has room for sketches on the device; keys and values are in the host's memory.
  bool host_rows = false;
  uint32_t list_tokens = 2048;  // of decode_e2e: fixed budgets on planted data
  uint32_t step_count = 41;     // of decode_e2e, on planted data
  // Files of requests that eviction replays (tests/bench/eviction_load.h).
  std::vector<std::string> request_traces = {};
};

// One measured figure.
struct Row {
  std::string workload;
  std::string case_name;
  double value = 0.0;
  std::string unit;
  // What `ratio` compares with: how many times faster than the baseline's case (or, for
  // "read_bandwidth" and "copy_bandwidth", the share of it that was reached; for "raw_socket", how
  // many times as long).
  std::string baseline;
  double ratio = 0.0;
  // The largest error found while checking against the oracle, in the unit that the workload's
  // comment names.
  double error = 0.0;
};

// Two numbers above 0 with an x between them, as 8x32768; nothing if it is anything else.
std::optional<std::pair<uint32_t, uint32_t>> ParseSize(std::string_view text);

// Median of `samples`; reorders them.
double Median(std::vector<double>* samples);

// Seconds that `work` takes.
double Seconds(const std::function<void()>& work);

struct Workload {
  std::string name;
  std::string description;
  // Appends rows. An error means that a result was wrong or could not be measured.
  absl::Status (*run)(const BenchOptions& options, std::vector<Row>* rows);
};

// All workloads, in the order of --list.
const std::vector<Workload>& Workloads();

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_BENCH_H_
