// Which rows are in the device's memory, and which on the host: the device keeps some room for what
// is new. Rows of idle sequences go first, then those of whoever has the most there, oldest first;
// if that does not do, idle sequences go whole, and for sketches, which cannot be elsewhere, any.
// What every step of a busy sequence reads comes back as soon as there is room, the rest when there
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

  // A piece of what is to be done. Bounds what it adds to the latency of the call behind it.
  void Step();
  // Before calls of so many rows, each of which may need another block while nothing can be moved.
  void KeepRoomFor(size_t block_count);
  // Moves rows to the host so that the device has `bytes` more, or what can be had.
  void MakeRoom(size_t bytes, BlockPool::RoomFor what);

 private:
  bool is_enabled() const { return pool_->host_arena() != nullptr; }
  size_t bytes_free() const { return pool_->device_arena().bytes_free(); }
  size_t Share(double share) const;
  bool IsIdle(const SequenceRecord& record) const;
  // False when nothing could be moved.
  bool FreeUntil(size_t bytes, BlockPool::RoomFor what);
  bool FreeSome(size_t bytes, BlockPool::RoomFor what);
  bool BringBack();
  SequenceRecord* WhoseRowsGo() const;
  SequenceRecord* WhoGoesWhole(BlockPool::RoomFor what) const;

  BlockPool* const pool_;
  const SequenceTable* const table_;
  Clock* const clock_;
  // Below the low mark, until the high one is reached.
  bool frees_ = false;
  // There was nothing to do: not to be looked for before.
  uint64_t next_ns_ = 0;
  // The same of KeepRoomFor, which every call asks.
  uint64_t no_room_until_ns_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ROW_PLACEMENT_H_
