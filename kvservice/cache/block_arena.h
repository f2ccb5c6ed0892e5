// One range of memory, reserved at start, from which pieces of blocks are taken.
//
// Free ranges are kept coalesced. Large pieces get the best fitting one; small ones are taken from
// the arena's end, so that they do not break up what large ones need. A piece is handed out with
// whatever the same tenant left in it, and cleared of what another one did.
//
// One thread; bytes_used() may be read by any.

#ifndef KVSERVICE_KVSERVICE_CACHE_BLOCK_ARENA_H_
#define KVSERVICE_KVSERVICE_CACHE_BLOCK_ARENA_H_

#include <atomic>
#include <cstddef>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "attention/device.h"
#include "kvservice/cache/block_owners.h"

namespace kvservice {

class BlockArena {
 public:
  // The device, borrowed, copies to and from the memory.
  BlockArena(Device* device, DeviceMemory memory);
  BlockArena(const BlockArena&) = delete;
  BlockArena& operator=(const BlockArena&) = delete;

  // Pieces are whole cache lines, so that slices and sketches are aligned to 64 bytes.
  static constexpr size_t Rounded(size_t bytes) {
    return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }

  // `bytes` is rounded. nullptr if no free range is long enough.
  std::byte* Take(size_t bytes, BlockOwner owner);
  std::byte* TakeAtEnd(size_t bytes, BlockOwner owner);
  void Return(std::byte* data, size_t bytes);
  // True if so many pieces of so many bytes, rounded, can be taken one after the other.
  bool Fits(size_t bytes, size_t count) const;

  size_t bytes() const { return memory_.bytes(); }
  size_t bytes_used() const { return bytes_used_.load(std::memory_order_relaxed); }
  size_t bytes_free() const { return usable_bytes_ - bytes_used(); }

 private:
  static constexpr size_t kLineBytes = 64;

  // Takes the part that begins at `offset` out of a free range.
  std::byte* TakePart(std::map<size_t, size_t>::iterator range, size_t offset, size_t bytes,
                      BlockOwner owner);
  void Clear(size_t offset, size_t bytes);
  void AddFree(size_t offset, size_t bytes);
  void RemoveFree(std::map<size_t, size_t>::iterator range);

  Device* const device_;
  const DeviceMemory memory_;
  // Whole cache lines.
  const size_t usable_bytes_;
  std::atomic<size_t> bytes_used_ = 0;

  // The same free ranges twice: offset -> bytes to coalesce, (bytes, offset) to find the best fit.
  std::map<size_t, size_t> free_by_offset_;
  std::set<std::pair<size_t, size_t>> free_by_bytes_;
  LastOwners last_owners_;
  // Made when a range first changes hands.
  std::vector<std::byte> zeros_;
  std::vector<MemoryCopy> clears_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_BLOCK_ARENA_H_
