#include "kvservice/cache/block_pool.h"

#include <algorithm>
#include <cassert>

namespace kvservice {
namespace {

// Slices and sketches are 64-byte aligned.
constexpr size_t kLineBytes = 64;
// Cleared at a time: stays in the cache of a CPU.
constexpr size_t kZeroBytes = size_t{256} << 10;

}  // namespace

struct BlockRef::Block {
  BlockPool* pool;
  std::byte* data;
  size_t bytes;
  BlockOwner owner;
  uint32_t reference_count;
};

BlockRef::~BlockRef() {
  if (block_ == nullptr || --block_->reference_count > 0) return;
  const std::unique_ptr<Block> last(block_);
  last->pool->Release(static_cast<size_t>(last->data - last->pool->memory_.data()), last->bytes,
                      last->owner);
}

BlockRef::BlockRef(Block* block) : block_(block), data_(block->data) {}

bool BlockRef::shared() const { return block_->reference_count > 1; }

BlockRef BlockRef::Share() const {
  ++block_->reference_count;
  return BlockRef(block_);
}

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::New(Device* device, size_t bytes) {
  auto memory = device->Allocate(bytes);
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<BlockPool>(new BlockPool(device, *std::move(memory)));
}

BlockPool::BlockPool(Device* device, DeviceMemory memory)
    : device_(device),
      memory_(std::move(memory)),
      usable_bytes_(memory_.bytes() / kLineBytes * kLineBytes) {
  if (usable_bytes_ > 0) AddFree(0, usable_bytes_);
}

BlockPool::~BlockPool() { assert(blocks_used() == 0); }

// Through the device: the memory may be its own.
void BlockPool::Clear(size_t offset, size_t bytes) {
  if (zeros_.empty()) zeros_.resize(kZeroBytes);
  clears_.clear();
  for (size_t done = 0; done < bytes; done += kZeroBytes) {
    clears_.push_back({.from = zeros_.data(),
                       .to = memory_.data() + offset + done,
                       .bytes = std::min(kZeroBytes, bytes - done)});
  }
  device_->Copy(clears_);
}

BlockRef BlockPool::Allocate(size_t bytes, BlockOwner owner) {
  assert(bytes > 0);
  bytes = (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  if (accounts_.BeyondMax(owner, bytes) > 0) {
    why_not_ = NoBlock::kOwnerMax;
    return BlockRef();
  }
  why_not_ = NoBlock::kPoolFull;
  const size_t held = accounts_.HeldFromOwner(owner);
  if (held > 0 && bytes_free() < held + bytes) return BlockRef();
  const auto fit = free_by_bytes_.lower_bound({bytes, 0});
  if (fit == free_by_bytes_.end()) return BlockRef();
  const auto [range_bytes, offset] = *fit;
  RemoveFree(free_by_offset_.find(offset));
  if (range_bytes > bytes) AddFree(offset + bytes, range_bytes - bytes);
  owners_.Take(offset, bytes, owner, [this](size_t begin, size_t count) { Clear(begin, count); });
  accounts_.Take(owner, bytes);
  bytes_used_.fetch_add(bytes, std::memory_order_relaxed);
  blocks_used_.fetch_add(1, std::memory_order_relaxed);
  auto block = std::make_unique<BlockRef::Block>(BlockRef::Block{.pool = this,
                                                                 .data = memory_.data() + offset,
                                                                 .bytes = bytes,
                                                                 .owner = owner,
                                                                 .reference_count = 1});
  return BlockRef(block.release());
}

void BlockPool::AddFree(size_t offset, size_t bytes) {
  free_by_offset_.emplace(offset, bytes);
  free_by_bytes_.emplace(bytes, offset);
}

void BlockPool::RemoveFree(std::map<size_t, size_t>::iterator range) {
  free_by_bytes_.erase({range->second, range->first});
  free_by_offset_.erase(range);
}

size_t BlockPool::Shortage(size_t bytes, BlockOwner owner) const {
  const size_t wanted = bytes + accounts_.HeldFromOwner(owner);
  return std::max(bytes, wanted > bytes_free() ? wanted - bytes_free() : 0);
}

void BlockPool::Release(size_t offset, size_t bytes, BlockOwner owner) {
  accounts_.Return(owner, bytes);
  bytes_used_.fetch_sub(bytes, std::memory_order_relaxed);
  blocks_used_.fetch_sub(1, std::memory_order_relaxed);
  auto next = free_by_offset_.lower_bound(offset);
  if (next != free_by_offset_.end() && next->first == offset + bytes) {
    bytes += next->second;
    const auto merged = next++;
    RemoveFree(merged);
  }
  if (next != free_by_offset_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      RemoveFree(previous);
    }
  }
  AddFree(offset, bytes);
}

}  // namespace kvservice
