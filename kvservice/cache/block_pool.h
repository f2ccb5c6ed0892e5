// The memory that all sequences share, handed out in blocks: an arena of the device's memory and,
// if there is to be more than the device has, one of the host's that the device reads in place.
//
// A block has rows (the slices of all layers), on the device or on the host, and sketches, always
// on the device, because every scan reads them whole. Without memory of the host it is one piece:
// with one model there is no fragmentation at all, with several a large block may find no range
// although the sum of the free ones would do. With it rows and sketches are two pieces, rows can be
// moved while nobody reads them, and the last block of an arena may not find its place. Accounting
// is exact: what is not free is held by some BlockRef.
//
// Every block has an owner, a tenant, and counts once for it, wherever its rows are and however
// many of its sequences share it. Nobody gets a block beyond its maximum, or out of what others
// have reserved (kvservice/cache/owner_accounts.h).
//
// Nobody reads what a block was handed out with (kvservice/cache/block_arena.h): a sequence reads
// only below its lengths, and a sketch only where a slice is full.
//
// One thread (the executor) allocates, shares, moves and releases; the counters may be read by any.

#ifndef KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_
#define KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "kvservice/cache/block_arena.h"
#include "kvservice/cache/block_owners.h"
#include "kvservice/cache/owner_accounts.h"

namespace kvservice {

class BlockPool;

// Where the rows of a block are.
enum class RowPlace : uint8_t { kDevice, kHost };

// What a block takes, each rounded up to whole cache lines.
struct BlockBytes {
  size_t rows = 0;
  size_t sketches = 0;

  size_t total() const { return BlockArena::Rounded(rows) + BlockArena::Rounded(sketches); }
};

// Shared ownership of one block; the last reference returns it to the pool. Move-only: sharing is
// spelled out. Refers to the pool, which must outlive it. Belongs to the pool's thread.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(BlockRef&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  BlockRef& operator=(BlockRef&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~BlockRef();

  explicit operator bool() const { return block_ != nullptr; }
  // 64-byte aligned. Rows stay where they are until BlockPool::Move.
  std::byte* rows() const;
  std::byte* sketches() const;
  RowPlace place() const;
  // Some other reference to the block exists: it must not be written.
  bool shared() const;
  BlockRef Share() const;

 private:
  friend class BlockPool;
  struct Block;
  explicit BlockRef(Block* block) : block_(block) {}

  Block* block_ = nullptr;
};

// Why a block was not to be had.
enum class NoBlock : uint8_t {
  kPoolFull,  // No free range is long enough, or what is free is reserved for others.
  kOwnerMax,  // The owner would have more than it may.
};

class BlockPool {
 public:
  // RESOURCE_EXHAUSTED if the device or the host cannot reserve that much. The device is borrowed.
  static absl::StatusOr<std::unique_ptr<BlockPool>> New(Device* device, size_t device_bytes,
                                                        size_t host_bytes = 0);
  // All blocks must have come back.
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // An empty reference when there is no block for this owner; why_not() tells why. Rows are on the
  // host where the device has no room, and none could be made.
  BlockRef Allocate(const BlockBytes& bytes, BlockOwner owner = 0);
  // Of the latest Allocate that gave nothing.
  NoBlock why_not() const { return why_not_; }
  // What others have to give back so that the owner may get `bytes`, at least that: pieces of what
  // is free may all be too short.
  size_t Shortage(size_t bytes, BlockOwner owner) const;

  // Called by Allocate when the device has no range of so many bytes, for rows or for what cannot
  // be elsewhere: moves rows to the host so that it may have. It may be called whenever Allocate
  // is.
  enum class RoomFor : uint8_t { kRows, kSketches };
  void SetRoomMaker(absl::AnyInvocable<void(size_t bytes, RoomFor what)> make_room) {
    make_room_ = std::move(make_room);
  }
  // Moves the rows of these blocks as far as there is room, in this order; those that are there
  // already stay. Nobody may be reading or writing them: no call is on the device, no write
  // pending. What sequences show changes (moves()). Returns how many it looked at: fewer than there
  // are when there was no more room.
  size_t Move(absl::Span<const BlockRef* const> blocks, RowPlace to);
  // Of one block, of those that were asked for.
  size_t sketch_bytes_max() const { return sketch_bytes_max_; }
  // Grows whenever rows are moved: addresses that were known before may be old.
  uint64_t moves() const { return moves_; }
  // Blocks that were moved there, since start.
  uint64_t moved_total(RowPlace to) const { return to == RowPlace::kHost ? to_host_ : to_device_; }

  BlockOwner OwnerOf(std::string_view tenant) { return owners_.NumberOf(tenant); }
  const BlockOwners& owners() const { return owners_; }
  const OwnerAccounts& accounts() const { return accounts_; }
  OwnerAccounts* mutable_limits() { return &accounts_; }

  // Of both arenas.
  size_t bytes() const { return device_arena_.bytes() + (host_arena_ ? host_arena_->bytes() : 0); }
  size_t bytes_used() const {
    return device_arena_.bytes_used() + (host_arena_ ? host_arena_->bytes_used() : 0);
  }
  uint64_t blocks_used() const { return blocks_used_.load(std::memory_order_relaxed); }
  const BlockArena& device_arena() const { return device_arena_; }
  // nullptr without one.
  const BlockArena* host_arena() const { return host_arena_ ? &*host_arena_ : nullptr; }

 private:
  friend class BlockRef;
  BlockPool(Device* device, DeviceMemory memory)
      : device_(device), device_arena_(device, std::move(memory)) {}
  template <typename Take>
  std::byte* TakeOrMakeRoom(size_t bytes, RoomFor what, Take take);
  BlockRef TakePieces(const BlockBytes& bytes, BlockOwner owner);
  BlockArena* ArenaOf(RowPlace place) {
    return place == RowPlace::kHost ? &*host_arena_ : &device_arena_;
  }
  void Release(const BlockRef::Block& block);
  size_t bytes_free() const {
    return device_arena_.bytes_free() + (host_arena_ ? host_arena_->bytes_free() : 0);
  }

  Device* const device_;
  BlockArena device_arena_;
  std::optional<BlockArena> host_arena_;
  std::atomic<uint64_t> blocks_used_ = 0;

  BlockOwners owners_;
  OwnerAccounts accounts_;
  NoBlock why_not_ = NoBlock::kPoolFull;
  absl::AnyInvocable<void(size_t bytes, RoomFor what)> make_room_;
  size_t sketch_bytes_max_ = 0;
  uint64_t moves_ = 0;
  uint64_t to_host_ = 0;
  uint64_t to_device_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_BLOCK_POOL_H_
