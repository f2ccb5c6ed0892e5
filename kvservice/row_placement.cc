#include "kvservice/row_placement.h"

#include <algorithm>

namespace kvservice {
namespace {

// Shares of the device's memory: rows leave below the low mark until the high one is reached, and
// come back above the one for that.
constexpr double kFreeLow = 0.02;
constexpr double kFreeHigh = 0.04;
constexpr double kFreeToSpare = 0.08;
// Moved at a time: some 2 ms of a PCIe 4 link.
constexpr size_t kStepBytes = size_t{32} << 20;
// Of one sequence, before it is asked again whose turn it is.
constexpr size_t kPieceBytes = kStepBytes / 4;
constexpr uint64_t kIdleNs = 1'000'000'000;
// Looking costs a visit to every sequence.
constexpr uint64_t kLookEveryNs = 20'000'000;

}  // namespace

size_t RowPlacement::Share(double share) const {
  return static_cast<size_t>(share * static_cast<double>(pool_->device_arena().bytes()));
}

bool RowPlacement::IsIdle(const SequenceRecord& record) const {
  return LastUsedNs(record) + kIdleNs <= clock_->SteadyNowNs();
}

SequenceRecord* RowPlacement::WhoseRowsGo() const {
  SequenceRecord* idlest = nullptr;
  SequenceRecord* largest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory) return;
    const size_t bytes = record->cache->movable_bytes();
    if (bytes == 0) return;
    if (largest == nullptr || bytes > largest->cache->movable_bytes()) largest = record;
    if (!IsIdle(*record)) return;
    if (idlest == nullptr || LastUsedNs(*record) < LastUsedNs(*idlest)) idlest = record;
  });
  return idlest != nullptr ? idlest : largest;
}

SequenceRecord* RowPlacement::WhoGoesWhole(BlockPool::RoomFor what) const {
  SequenceRecord* idlest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory) return;
    if (what == BlockPool::RoomFor::kRows && !IsIdle(*record)) return;
    if (!record->cache->HasStepRowsOn(RowPlace::kDevice)) return;
    if (idlest == nullptr || LastUsedNs(*record) < LastUsedNs(*idlest)) idlest = record;
  });
  return idlest;
}

bool RowPlacement::FreeUntil(size_t bytes, BlockPool::RoomFor what) {
  while (bytes_free() < bytes) {
    if (!FreeSome(std::min(kPieceBytes, bytes - bytes_free()), what)) return false;
  }
  return true;
}

bool RowPlacement::FreeSome(size_t bytes, BlockPool::RoomFor what) {
  SequenceRecord* record = WhoseRowsGo();
  if (record != nullptr && record->cache->MoveToHost(bytes)) return true;
  record = WhoGoesWhole(what);
  return record != nullptr && record->cache->MoveAllToHost();
}

void RowPlacement::MakeRoom(size_t bytes, BlockPool::RoomFor what) {
  if (!is_enabled()) return;
  // What is free may be in pieces.
  FreeUntil(bytes_free() + std::max(bytes, std::min(kStepBytes, Share(kFreeHigh))), what);
  if (what == BlockPool::RoomFor::kRows) return;
  while (!pool_->device_arena().Fits(bytes, 1) && FreeSome(std::min(kPieceBytes, bytes), what)) {
  }
}

void RowPlacement::KeepRoomFor(size_t block_count) {
  // Rows have the host; only sketches must find a place, each in one piece.
  const size_t bytes = pool_->sketch_bytes_max();
  const auto has_room = [&] { return pool_->device_arena().Fits(bytes, block_count); };
  if (!is_enabled() || has_room()) return;
  const uint64_t now_ns = clock_->SteadyNowNs();
  if (now_ns < no_room_until_ns_) return;
  while (!has_room()) {
    if (FreeSome(std::min(kPieceBytes, bytes * block_count), BlockPool::RoomFor::kSketches))
      continue;
    no_room_until_ns_ = now_ns + kLookEveryNs;
    return;
  }
}

bool RowPlacement::BringBack() {
  const bool has_to_spare = bytes_free() > Share(kFreeToSpare);
  SequenceRecord* needs = nullptr;
  SequenceRecord* largest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory || IsIdle(*record)) return;
    if (needs == nullptr && record->cache->HasStepRowsOn(RowPlace::kHost)) needs = record;
    const size_t bytes = record->cache->host_bytes();
    if (bytes == 0 || (largest != nullptr && bytes <= largest->cache->host_bytes())) return;
    largest = record;
  });
  if (needs != nullptr) return needs->cache->MoveStepRowsToDevice();
  if (largest == nullptr || !has_to_spare) return false;
  return largest->cache->MoveToDevice(std::min(kStepBytes, bytes_free() - Share(kFreeToSpare)));
}

void RowPlacement::Step() {
  if (!is_enabled()) return;
  const size_t high = Share(kFreeHigh);
  frees_ = bytes_free() < (frees_ ? high : Share(kFreeLow));
  const uint64_t now_ns = clock_->SteadyNowNs();
  if (now_ns < next_ns_) return;
  const bool has_moved =
      frees_ ? FreeUntil(std::min(high, bytes_free() + kStepBytes), BlockPool::RoomFor::kRows)
             : BringBack();
  if (!has_moved) next_ns_ = now_ns + kLookEveryNs;
}

}  // namespace kvservice
