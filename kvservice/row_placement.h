// Which rows are in the device's memory, and which on the host: the device keeps some room for what
// is new. Rows of idle sequences go first, then those of whoever has the most there, oldest first;
// if that does not do, sequences go whole, the least recently used first. They come back when there
// is room to spare.
//
// Nothing here changes an answer: rows are read wherever they are. Executor thread, while no call
// is on the device and no write is pending.

#ifndef KVSERVICE_KVSERVICE_ROW_PLACEMENT_H_
#define KVSERVICE_KVSERVICE_ROW_PLACEMENT_H_

#include <cstddef>
#include <cstdint>

#include "kvservice/cache/block_pool.h"
#include "kvservice/clock.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

class RowPlacement {
 public:
  // Borrows.
  RowPlacement(BlockPool* pool, const SequenceTable* table, Clock* clock)
      : pool_(pool), table_(table), clock_(clock) {}

  // A piece of what keeps the device's free share between its marks. Bounds what it adds to the
  // latency of the call behind it.
  void Step();
  // Moves rows to the host so that the device has `bytes` more, or what can be had.
  void MakeRoom(size_t bytes);

 private:
  bool is_enabled() const { return pool_->host_arena() != nullptr; }
  size_t bytes_free() const { return pool_->device_arena().bytes_free(); }
  size_t Share(double share) const;
  // False when nothing could be moved.
  bool FreeUntil(size_t bytes);
  SequenceRecord* WhoseRowsGo() const;
  SequenceRecord* WhoGoesWhole() const;
  SequenceRecord* WhoseRowsComeBack() const;

  BlockPool* const pool_;
  const SequenceTable* const table_;
  Clock* const clock_;
  // Below the low mark, until the high one is reached.
  bool frees_ = false;
  // Nothing could be moved: not to be tried again before.
  uint64_t next_ns_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ROW_PLACEMENT_H_
