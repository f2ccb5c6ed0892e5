#include "tests/bench/workloads.h"

#include <algorithm>
#include <chrono>

namespace kvservice::bench {

const std::vector<Workload>& Workloads() {
  static const auto* const kWorkloads = new std::vector<Workload>{
      {"attend_cpu", "one layer, 32k tokens, 32 query / 8 KV heads, d=128, bf16", RunAttendCpu},
      {"decode_e2e", "decode steps of one layer through gRPC against local dense attention",
       RunDecodeE2e},
      {"append", "bulk prefill by lane and stream, against one CPU's copies in memory", RunAppend},
      {"rpc_latency", "a call there and back by every way, against a raw Unix socket",
       RunRpcLatency},
      {"rpc_idle", "the first call after two idle seconds, by every way", RunRpcIdle},
      {"rpc_throughput", "calls per second of two workers, against one", RunRpcThroughput},
  };
  return *kWorkloads;
}

double Median(std::vector<double>* samples) {
  const auto middle = samples->begin() + static_cast<std::ptrdiff_t>(samples->size() / 2);
  std::nth_element(samples->begin(), middle, samples->end());
  return *middle;
}

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace kvservice::bench
