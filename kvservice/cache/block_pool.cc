#include "kvservice/cache/block_pool.h"

#include <algorithm>
#include <cassert>
#include <vector>

namespace kvservice {

struct BlockRef::Block {
  BlockPool* pool = nullptr;
  std::byte* rows = nullptr;
  std::byte* sketches = nullptr;
  BlockBytes bytes;
  RowPlace place = RowPlace::kDevice;
  BlockOwner owner = 0;
  uint32_t reference_count = 0;
};

BlockRef::~BlockRef() {
  if (block_ == nullptr || --block_->reference_count > 0) return;
  const std::unique_ptr<Block> last(block_);
  last->pool->Release(*last);
}

std::byte* BlockRef::rows() const { return block_->rows; }

std::byte* BlockRef::sketches() const { return block_->sketches; }

RowPlace BlockRef::place() const { return block_->place; }

bool BlockRef::shared() const { return block_->reference_count > 1; }

BlockRef BlockRef::Share() const {
  ++block_->reference_count;
  return BlockRef(block_);
}

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::New(Device* device, size_t device_bytes,
                                                          size_t host_bytes) {
  auto memory = device->Allocate(device_bytes);
  if (!memory.ok()) return memory.status();
  std::unique_ptr<BlockPool> pool(new BlockPool(device, *std::move(memory)));
  if (host_bytes == 0) return pool;
  auto host_memory = device->AllocateOnHost(host_bytes);
  if (!host_memory.ok()) return host_memory.status();
  pool->host_arena_.emplace(device, *std::move(host_memory));
  return pool;
}

BlockPool::~BlockPool() { assert(blocks_used() == 0); }

template <typename Take>
std::byte* BlockPool::TakeOrMakeRoom(size_t bytes, RoomFor what, Take take) {
  std::byte* const taken = take();
  if (taken != nullptr || make_room_ == nullptr) return taken;
  make_room_(bytes, what);
  return take();
}

// The device first: what is new is what is read next.
BlockRef BlockPool::TakePieces(const BlockBytes& bytes, BlockOwner owner) {
  BlockRef::Block block = {.pool = this, .bytes = bytes, .owner = owner, .reference_count = 1};
  if (!host_arena_.has_value()) {
    block.rows = device_arena_.Take(bytes.total(), owner);
    if (block.rows == nullptr) return BlockRef();
    block.sketches = block.rows + BlockArena::Rounded(bytes.rows);
    return BlockRef(std::make_unique<BlockRef::Block>(block).release());
  }
  // Sketches before rows, which have somewhere else to be.
  if (bytes.sketches > 0) {
    block.sketches = TakeOrMakeRoom(bytes.sketches, RoomFor::kSketches,
                                    [&] { return device_arena_.TakeAtEnd(bytes.sketches, owner); });
    if (block.sketches == nullptr) return BlockRef();
  }
  block.rows = TakeOrMakeRoom(bytes.rows, RoomFor::kRows,
                              [&] { return device_arena_.Take(bytes.rows, owner); });
  if (block.rows == nullptr) {
    block.place = RowPlace::kHost;
    block.rows = host_arena_->Take(bytes.rows, owner);
  }
  if (block.rows == nullptr) {
    if (block.sketches != nullptr) device_arena_.Return(block.sketches, bytes.sketches);
    return BlockRef();
  }
  return BlockRef(std::make_unique<BlockRef::Block>(block).release());
}

BlockRef BlockPool::Allocate(const BlockBytes& bytes, BlockOwner owner) {
  const size_t total = bytes.total();
  assert(bytes.rows > 0);
  sketch_bytes_max_ = std::max(sketch_bytes_max_, BlockArena::Rounded(bytes.sketches));
  if (accounts_.BeyondMax(owner, total) > 0) {
    why_not_ = NoBlock::kOwnerMax;
    return BlockRef();
  }
  why_not_ = NoBlock::kPoolFull;
  const size_t held = accounts_.HeldFromOwner(owner);
  if (held > 0 && bytes_free() < held + total) return BlockRef();
  BlockRef block = TakePieces(bytes, owner);
  if (!block) return block;
  accounts_.Take(owner, total);
  blocks_used_.fetch_add(1, std::memory_order_relaxed);
  return block;
}

size_t BlockPool::Move(absl::Span<const BlockRef* const> blocks, RowPlace to) {
  if (to == RowPlace::kHost && !host_arena_) return 0;
  std::vector<MemoryCopy> copies;
  size_t count = 0;
  for (; count < blocks.size(); ++count) {
    BlockRef::Block* const block = blocks[count]->block_;
    if (block->place == to) continue;
    std::byte* const rows = ArenaOf(to)->Take(block->bytes.rows, block->owner);
    if (rows == nullptr) break;
    copies.push_back({.from = block->rows, .to = rows, .bytes = block->bytes.rows});
    // Where it was is released once it has been read.
    block->rows = rows;
    block->place = to;
  }
  if (copies.empty()) return count;
  device_->Copy(copies);
  const RowPlace from = to == RowPlace::kHost ? RowPlace::kDevice : RowPlace::kHost;
  for (const MemoryCopy& copy : copies) {
    ArenaOf(from)->Return(const_cast<std::byte*>(copy.from), copy.bytes);
  }
  ++moves_;
  (to == RowPlace::kHost ? to_host_ : to_device_) += copies.size();
  return count;
}

size_t BlockPool::Shortage(size_t bytes, BlockOwner owner) const {
  const size_t wanted = bytes + accounts_.HeldFromOwner(owner);
  return std::max(bytes, wanted > bytes_free() ? wanted - bytes_free() : 0);
}

void BlockPool::Release(const BlockRef::Block& block) {
  accounts_.Return(block.owner, block.bytes.total());
  blocks_used_.fetch_sub(1, std::memory_order_relaxed);
  if (!host_arena_.has_value()) return device_arena_.Return(block.rows, block.bytes.total());
  ArenaOf(block.place)->Return(block.rows, block.bytes.rows);
  if (block.sketches != nullptr) device_arena_.Return(block.sketches, block.bytes.sketches);
}

}  // namespace kvservice
