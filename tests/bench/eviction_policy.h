// Which sequence leaves memory, for `kvbench --workload=eviction`: policies that the server might
// have. The unit is a whole sequence of so many blocks; bringing it back costs as many. One thread.

#ifndef KVSERVICE_TESTS_BENCH_EVICTION_POLICY_H_
#define KVSERVICE_TESTS_BENCH_EVICTION_POLICY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kvservice::bench {

// Numbered from 0, without large gaps.
using SequenceNumber = uint32_t;

struct Use {
  SequenceNumber sequence = 0;
  // That it has from now on.
  uint64_t blocks = 0;
  // Number of the use that comes next, UINT64_MAX if none does: only the clairvoyant one looks.
  uint64_t next_use = UINT64_MAX;
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A sequence that is new, is in memory, or has come back.
  virtual void Used(const Use& use) = 0;
  // It has ended, wherever it was.
  virtual void Ended(SequenceNumber sequence) = 0;
  // One in memory, which then is not any more; another one than `keep`, which is there too. There
  // is another one.
  virtual SequenceNumber Evict(SequenceNumber keep) = 0;
};

// "lru", "s3fifo" and "s3fifo_once" (Yang and others, FIFO queues are all you need for cache
// eviction, SOSP 2023; a tenth of memory is the small queue; what was used again once is promoted,
// or more than once as in the paper), "arc" (Megiddo and Modha, FAST 2003, with blocks in the place
// of pages), "belady" (the one whose next use is farthest: a bound for sequences of one size, and
// close to one here). `capacity` in blocks. nullptr for other names.
std::unique_ptr<EvictionPolicy> NewEvictionPolicy(std::string_view name, uint64_t capacity);
const std::vector<std::string>& EvictionPolicyNames();

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_EVICTION_POLICY_H_
