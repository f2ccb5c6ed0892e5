// Which sequence leaves the pool, and what is on its way out.
//
// The tenant is chosen first, by what it has beyond its reserve and not by who used what when: so
// nobody learns from their own sequences what others do, and whoever takes the most gives first.
// Within the tenant the least recently used one goes. Nobody falls below its reserve for another's
// sake.
//
// Executor thread.

#ifndef KVSERVICE_KVSERVICE_EVICTIONS_H_
#define KVSERVICE_KVSERVICE_EVICTIONS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/functional/function_ref.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/engine.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

class Evictions {
 public:
  // Borrows.
  Evictions(const BlockPool* pool, const SequenceTable* table) : pool_(pool), table_(table) {}

  struct Ask {
    EvictionCause cause = EvictionCause::kPoolFull;
    // Who needs room; 0 = nobody in particular.
    BlockOwner owner = 0;
    // Stays.
    const SequenceRecord* keep = nullptr;
    // Sequences that were used later stay.
    uint64_t used_before_ns = UINT64_MAX;
  };
  // nullptr if nothing can leave. Only sequences that `may_leave` are looked at.
  SequenceRecord* Choose(const Ask& ask,
                         absl::FunctionRef<bool(const SequenceRecord& record)> may_leave) const;

  // A sequence in memory is on its way out; End when it has gone, or stays after all. Returns what
  // to give to End.
  struct Leaving {
    BlockOwner owner = 0;
    size_t bytes = 0;
  };
  Leaving Begin(const SequenceRecord& record);
  void End(const Leaving& leaving);
  void Count(EvictionCause cause) { ++totals_[static_cast<size_t>(cause)]; }

  // Bytes of blocks on their way out, shared ones counted for each that leaves: of all, and of one.
  size_t leaving_bytes() const { return leaving_bytes_; }
  size_t LeavingBytesOf(BlockOwner owner) const;
  const EvictionTotals& totals() const { return totals_; }

 private:
  bool StaysAboveReserve(const SequenceRecord& record) const;

  const BlockPool* const pool_;
  const SequenceTable* const table_;

  std::map<BlockOwner, size_t> leaving_;
  size_t leaving_bytes_ = 0;
  EvictionTotals totals_{};
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_EVICTIONS_H_
