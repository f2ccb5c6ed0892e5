// How fast a server answers, measured from outside with the client library. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_BENCH_H_
#define KVSERVICE_CLIENT_KVCTL_BENCH_H_

#include <cstdint>
#include <string>

#include "client/kvctl/commands.h"

namespace kvservice::client {

struct BenchOptions {
  // Of the model and the one sequence that are made for it.
  uint32_t layers = 2;
  uint32_t query_heads = 8;
  uint32_t kv_heads = 2;
  uint32_t head_dim = 64;
  uint32_t tokens = 4096;
  // Attends of one row each, after the sequence was filled.
  uint32_t count = 200;
  // The server's name of one.
  std::string policy = "dense";
};

// Registers a model whose name tells the shape, creates a sequence, fills it, attends to it, drops
// it. The keys are random: bounds and shares say nothing about any real model. Ends at
// options.timeout at the latest. Prints throughput of filling and percentiles of the calls' times.
int RunBench(const GlobalOptions& options, const BenchOptions& bench);

// Round trips of a call that does nothing.
int Ping(const GlobalOptions& options, uint32_t count);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_BENCH_H_
