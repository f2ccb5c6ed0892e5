// One function per workload; see bench.h.

#ifndef KVSERVICE_TESTS_BENCH_WORKLOADS_H_
#define KVSERVICE_TESTS_BENCH_WORKLOADS_H_

#include <vector>

#include "absl/status/status.h"
#include "tests/bench/bench.h"

namespace kvservice::bench {

// One layer of one sequence on a host device: dense, a reused list, scan-and-choose, certified,
// sealing.
absl::Status RunAttendCpu(const BenchOptions& options, std::vector<Row>* rows);

// Decode steps of one layer through gRPC, between two processes, against dense attention in the
// caller's own.
absl::Status RunDecodeE2e(const BenchOptions& options, std::vector<Row>* rows);

// Bulk prefill by the lane and by a stream, against one CPU's copies in memory.
absl::Status RunAppend(const BenchOptions& options, std::vector<Row>* rows);

// A sequence from one server to another, against one CPU's copies and a raw Unix socket.
absl::Status RunTransfer(const BenchOptions& options, std::vector<Row>* rows);

// A call there and back by every way, against as many bytes through a raw Unix socket.
absl::Status RunRpcLatency(const BenchOptions& options, std::vector<Row>* rows);

// The first call after two idle seconds, by every way.
absl::Status RunRpcIdle(const BenchOptions& options, std::vector<Row>* rows);

// What a full pool has to bring back from disk under several eviction policies.
absl::Status RunEviction(const BenchOptions& options, std::vector<Row>* rows);

// What two workers get done, against one.
absl::Status RunRpcThroughput(const BenchOptions& options, std::vector<Row>* rows);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_WORKLOADS_H_
