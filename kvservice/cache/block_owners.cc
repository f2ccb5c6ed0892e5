#include "kvservice/cache/block_owners.h"

#include <algorithm>

namespace kvservice {

BlockOwner BlockOwners::NumberOf(std::string_view tenant) {
  const auto found = numbers_.find(tenant);
  if (found != numbers_.end()) return found->second;
  const auto number = static_cast<BlockOwner>(numbers_.size() + 1);
  numbers_.emplace(tenant, number);
  return number;
}

void LastOwners::Take(size_t offset, size_t bytes, BlockOwner owner,
                      absl::FunctionRef<void(size_t offset, size_t bytes)> clear) {
  const size_t end = offset + bytes;
  auto next = ranges_.lower_bound(offset);
  if (next != ranges_.begin() && std::prev(next)->second.end > offset) --next;
  while (next != ranges_.end() && next->first < end) {
    const size_t begin = next->first;
    const Range old = next->second;
    const size_t from = std::max(begin, offset);
    const size_t to = std::min(old.end, end);
    if (old.owner != owner) clear(from, to - from);
    next = ranges_.erase(next);
    // What lies outside stays whose it was.
    if (begin < offset) ranges_.emplace(begin, Range{.end = offset, .owner = old.owner});
    if (old.end > end) ranges_.emplace(end, Range{.end = old.end, .owner = old.owner});
  }
  ranges_[offset] = {.end = end, .owner = owner};
}

}  // namespace kvservice
