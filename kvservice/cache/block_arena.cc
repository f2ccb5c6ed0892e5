#include "kvservice/cache/block_arena.h"

#include <algorithm>
#include <iterator>

namespace kvservice {
namespace {

// Cleared at a time: stays in the cache of a CPU.
constexpr size_t kZeroBytes = size_t{256} << 10;

}  // namespace

BlockArena::BlockArena(Device* device, DeviceMemory memory)
    : device_(device),
      memory_(std::move(memory)),
      usable_bytes_(memory_.bytes() / kLineBytes * kLineBytes) {
  if (usable_bytes_ > 0) AddFree(0, usable_bytes_);
}

// Through the device: the memory may be its own.
void BlockArena::Clear(size_t offset, size_t bytes) {
  if (zeros_.empty()) zeros_.resize(kZeroBytes);
  clears_.clear();
  for (size_t done = 0; done < bytes; done += kZeroBytes) {
    clears_.push_back({.from = zeros_.data(),
                       .to = memory_.data() + offset + done,
                       .bytes = std::min(kZeroBytes, bytes - done)});
  }
  device_->Copy(clears_);
}

std::byte* BlockArena::Take(size_t bytes, BlockOwner owner) {
  bytes = Rounded(bytes);
  const auto fit = free_by_bytes_.lower_bound({bytes, 0});
  if (fit == free_by_bytes_.end()) return nullptr;
  return TakePart(free_by_offset_.find(fit->second), fit->second, bytes, owner);
}

std::byte* BlockArena::TakeAtEnd(size_t bytes, BlockOwner owner) {
  bytes = Rounded(bytes);
  auto range = free_by_offset_.end();
  while (range != free_by_offset_.begin()) {
    --range;
    if (range->second < bytes) continue;
    return TakePart(range, range->first + range->second - bytes, bytes, owner);
  }
  return nullptr;
}

std::byte* BlockArena::TakePart(std::map<size_t, size_t>::iterator range, size_t offset,
                                size_t bytes, BlockOwner owner) {
  const auto [first, length] = *range;
  const size_t end = first + length;
  RemoveFree(range);
  if (offset > first) AddFree(first, offset - first);
  if (offset + bytes < end) AddFree(offset + bytes, end - offset - bytes);
  last_owners_.Take(offset, bytes, owner,
                    [this](size_t begin, size_t count) { Clear(begin, count); });
  bytes_used_.fetch_add(bytes, std::memory_order_relaxed);
  return memory_.data() + offset;
}

void BlockArena::Return(std::byte* data, size_t bytes) {
  auto offset = static_cast<size_t>(data - memory_.data());
  bytes = Rounded(bytes);
  bytes_used_.fetch_sub(bytes, std::memory_order_relaxed);
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

bool BlockArena::Fits(size_t bytes, size_t count) const {
  if (bytes == 0) return true;
  bytes = Rounded(bytes);
  size_t found = 0;
  for (auto range = free_by_bytes_.rbegin(); found < count; ++range) {
    if (range == free_by_bytes_.rend() || range->first < bytes) return false;
    found += range->first / bytes;
  }
  return true;
}

void BlockArena::AddFree(size_t offset, size_t bytes) {
  free_by_offset_.emplace(offset, bytes);
  free_by_bytes_.emplace(bytes, offset);
}

void BlockArena::RemoveFree(std::map<size_t, size_t>::iterator range) {
  free_by_bytes_.erase({range->second, range->first});
  free_by_offset_.erase(range);
}

}  // namespace kvservice
