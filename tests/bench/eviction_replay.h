// What a policy costs: turns replayed against a pool of so many blocks and a disk without end. One
// thread.

#ifndef KVSERVICE_TESTS_BENCH_EVICTION_REPLAY_H_
#define KVSERVICE_TESTS_BENCH_EVICTION_REPLAY_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/bench/eviction_load.h"

namespace kvservice::bench {

struct ReplayCost {
  // Of sequences that were used again, the blocks they had; and what of that had to be brought
  // back.
  uint64_t blocks_asked = 0;
  uint64_t blocks_loaded = 0;
  uint64_t turns = 0;
  uint64_t turns_that_waited = 0;
  // Blocks that were written because their sequence had to leave, each once.
  uint64_t blocks_written = 0;
  // The most that were in memory.
  uint64_t blocks_max = 0;
};

// Sequences that nobody uses for a lease end by themselves. Blocks that forks share are there once
// until one of the sequences leaves memory; it comes back with its own. INTERNAL if the pool ever
// had more than its capacity and more than one sequence.
absl::StatusOr<ReplayCost> Replay(const std::vector<Turn>& turns, uint64_t lease_ms,
                                  uint64_t capacity_blocks, std::string_view policy);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_EVICTION_REPLAY_H_
