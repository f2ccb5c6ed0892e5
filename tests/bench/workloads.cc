#include "tests/bench/workloads.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <system_error>

namespace kvservice::bench {

const std::vector<Workload>& Workloads() {
  static const auto* const kWorkloads = new std::vector<Workload>{
      {"attend_cpu", "one layer, 32k tokens, 32 query / 8 KV heads, d=128, bf16", RunAttendCpu},
      {"decode_e2e", "decode steps of one layer through gRPC against local dense attention",
       RunDecodeE2e},
      {"append", "bulk prefill by lane and stream, against one CPU's copies in memory", RunAppend},
      {"transfer", "a sequence from server to server, against copies and a raw Unix socket",
       RunTransfer},
      {"rpc_latency", "a call there and back by every way, against a raw Unix socket",
       RunRpcLatency},
      {"rpc_idle", "the first call after two idle seconds, by every way", RunRpcIdle},
      {"eviction", "what leaves a full pool: LRU, S3-FIFO, ARC and foresight on turns of sequences",
       RunEviction},
      {"rpc_throughput", "calls per second of two workers, against one", RunRpcThroughput},
  };
  return *kWorkloads;
}

std::optional<std::pair<uint32_t, uint32_t>> ParseSize(std::string_view text) {
  std::pair<uint32_t, uint32_t> size;
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, size.first);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != 'x') return std::nullopt;
  const auto second = std::from_chars(first.ptr + 1, end, size.second);
  if (second.ec != std::errc() || second.ptr != end) return std::nullopt;
  if (size.first == 0 || size.second == 0) return std::nullopt;
  return size;
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
