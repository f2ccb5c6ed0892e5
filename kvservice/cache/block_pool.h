// The memory that all sequences share: one arena, reserved at start, handed out in blocks.
//
// A block is one contiguous range: the slices of all layers, then their sketch slices. Models
// differ in block size, so the arena keeps its free ranges coalesced and gives out the best fitting
// one; with one model there is no fragmentation at all, with several a large block may find no
// range although the sum of the free ones would do. Accounting is exact: what is not free is held
// by some BlockRef.
//
// Every block has an owner, a tenant, and counts once for it, however many of its sequences share
// it. Nobody gets a block beyond its maximum, or out of what others have reserved
// (kvservice/cache/owner_accounts.h).
//
// A block is handed out with whatever the same tenant left in it, and cleared of what another one
// did. Nobody reads either: a sequence reads only below its lengths, and a sketch only where a
// slice is full.
//
// One thread (the executor) allocates, shares and releases; the counters may be read by any.

#ifndef KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_
#define KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/cache/block_owners.h"
#include "kvservice/cache/owner_accounts.h"

namespace kvservice {

class BlockPool;

// Shared ownership of one block; the last reference returns it to the pool. Move-only: sharing is
// spelled out. Refers to the pool, which must outlive it. Belongs to the pool's thread.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(BlockRef&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)), data_(std::exchange(other.data_, nullptr)) {}
  BlockRef& operator=(BlockRef&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~BlockRef();

  explicit operator bool() const { return block_ != nullptr; }
  // 64-byte aligned.
  std::byte* data() const { return data_; }
  // Some other reference to the block exists: it must not be written.
  bool shared() const;
  BlockRef Share() const;

 private:
  friend class BlockPool;
  struct Block;
  explicit BlockRef(Block* block);

  Block* block_ = nullptr;
  // The block's own, here so that walking a block table reads the table alone.
  std::byte* data_ = nullptr;
};

// Why a block was not to be had.
enum class NoBlock : uint8_t {
  kPoolFull,  // No free range is long enough, or what is free is reserved for others.
  kOwnerMax,  // The owner would have more than it may.
};

class BlockPool {
 public:
  // RESOURCE_EXHAUSTED if the device cannot reserve `bytes`. The device is borrowed.
  static absl::StatusOr<std::unique_ptr<BlockPool>> New(Device* device, size_t bytes);
  // All blocks must have come back.
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // An empty reference when there is no block for this owner; why_not() tells why. `bytes` is
  // rounded up to whole cache lines.
  BlockRef Allocate(size_t bytes, BlockOwner owner = 0);
  // Of the latest Allocate that gave nothing.
  NoBlock why_not() const { return why_not_; }
  // What others have to give back so that the owner may get `bytes`, at least that: pieces of what
  // is free may all be too short.
  size_t Shortage(size_t bytes, BlockOwner owner) const;

  BlockOwner OwnerOf(std::string_view tenant) { return owners_.NumberOf(tenant); }
  const BlockOwners& owners() const { return owners_; }
  const OwnerAccounts& accounts() const { return accounts_; }
  OwnerAccounts* mutable_limits() { return &accounts_; }

  size_t bytes() const { return memory_.bytes(); }
  size_t bytes_used() const { return bytes_used_.load(std::memory_order_relaxed); }
  uint64_t blocks_used() const { return blocks_used_.load(std::memory_order_relaxed); }

 private:
  friend class BlockRef;
  BlockPool(Device* device, DeviceMemory memory);
  void Clear(size_t offset, size_t bytes);
  void AddFree(size_t offset, size_t bytes);
  void RemoveFree(std::map<size_t, size_t>::iterator range);
  void Release(size_t offset, size_t bytes, BlockOwner owner);
  size_t bytes_free() const { return usable_bytes_ - bytes_used(); }

  Device* const device_;
  const DeviceMemory memory_;
  // Whole cache lines.
  const size_t usable_bytes_;

  std::atomic<size_t> bytes_used_ = 0;
  std::atomic<uint64_t> blocks_used_ = 0;

  // The same free ranges twice: offset -> bytes to coalesce, (bytes, offset) to find the best fit.
  std::map<size_t, size_t> free_by_offset_;
  std::set<std::pair<size_t, size_t>> free_by_bytes_;
  BlockOwners owners_;
  OwnerAccounts accounts_;
  NoBlock why_not_ = NoBlock::kPoolFull;
  // Made when a block first changes hands.
  std::vector<std::byte> zeros_;
  std::vector<MemoryCopy> clears_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_
