#include "kvservice/evictions.h"

#include <algorithm>

namespace kvservice {
namespace {

size_t BytesOf(const SequenceRecord& record) {
  return record.cache->block_count() * record.tables->shape.block_bytes();
}

}  // namespace

// At the most: what it shares with others stays with them.
bool Evictions::StaysAboveReserve(const SequenceRecord& record) const {
  const BlockOwner owner = record.cache->owner();
  const OwnerAccount account = pool_->accounts().Of(owner);
  const size_t gone = LeavingBytesOf(owner) + BytesOf(record);
  return account.limits.bytes_reserved == 0 ||
         account.bytes >= gone + account.limits.bytes_reserved;
}

SequenceRecord* Evictions::Choose(
    const Ask& ask, absl::FunctionRef<bool(const SequenceRecord& record)> may_leave) const {
  std::map<BlockOwner, SequenceRecord*> oldest;
  table_->ForEach([&](SequenceRecord* record) {
    if (record == ask.keep || record->residence != Residence::kMemory) return;
    if (record->cache->block_count() == 0 || LastUsedNs(*record) > ask.used_before_ns) return;
    const BlockOwner owner = record->cache->owner();
    if (ask.cause == EvictionCause::kTenantMax && owner != ask.owner) return;
    SequenceRecord*& best = oldest[owner];
    if (best != nullptr && LastUsedNs(*best) <= LastUsedNs(*record)) return;
    if (owner != ask.owner && !StaysAboveReserve(*record)) return;
    if (may_leave(*record)) best = record;
  });
  SequenceRecord* chosen = nullptr;
  int64_t most = 0;
  for (const auto& [owner, record] : oldest) {
    if (record == nullptr) continue;
    const OwnerAccount account = pool_->accounts().Of(owner);
    const auto beyond = static_cast<int64_t>(account.bytes) -
                        static_cast<int64_t>(LeavingBytesOf(owner)) -
                        static_cast<int64_t>(account.limits.bytes_reserved);
    if (chosen != nullptr && beyond <= most) continue;
    chosen = record;
    most = beyond;
  }
  return chosen;
}

Evictions::Leaving Evictions::Begin(const SequenceRecord& record) {
  const Leaving leaving = {.owner = record.cache->owner(), .bytes = BytesOf(record)};
  leaving_[leaving.owner] += leaving.bytes;
  leaving_bytes_ += leaving.bytes;
  return leaving;
}

void Evictions::End(const Leaving& leaving) {
  const auto found = leaving_.find(leaving.owner);
  if (found == leaving_.end()) return;
  found->second -= leaving.bytes;
  leaving_bytes_ -= leaving.bytes;
  if (found->second == 0) leaving_.erase(found);
}

size_t Evictions::LeavingBytesOf(BlockOwner owner) const {
  const auto found = leaving_.find(owner);
  return found == leaving_.end() ? 0 : found->second;
}

}  // namespace kvservice
