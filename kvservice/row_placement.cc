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
constexpr uint64_t kRetryNs = 100'000'000;

}  // namespace

size_t RowPlacement::Share(double share) const {
  return static_cast<size_t>(share * static_cast<double>(pool_->device_arena().bytes()));
}

SequenceRecord* RowPlacement::WhoseRowsGo() const {
  const uint64_t now_ns = clock_->SteadyNowNs();
  SequenceRecord* idlest = nullptr;
  SequenceRecord* largest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory) return;
    const size_t bytes = record->cache->movable_bytes();
    if (bytes == 0) return;
    if (largest == nullptr || bytes > largest->cache->movable_bytes()) largest = record;
    if (LastUsedNs(*record) + kIdleNs > now_ns) return;
    if (idlest == nullptr || LastUsedNs(*record) < LastUsedNs(*idlest)) idlest = record;
  });
  return idlest != nullptr ? idlest : largest;
}

SequenceRecord* RowPlacement::WhoGoesWhole() const {
  SequenceRecord* idlest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory || !record->cache->has_more_to_move()) return;
    if (idlest == nullptr || LastUsedNs(*record) < LastUsedNs(*idlest)) idlest = record;
  });
  return idlest;
}

SequenceRecord* RowPlacement::WhoseRowsComeBack() const {
  const uint64_t now_ns = clock_->SteadyNowNs();
  SequenceRecord* largest = nullptr;
  table_->ForEach([&](SequenceRecord* record) {
    if (record->residence != Residence::kMemory || record->cache->host_bytes() == 0) return;
    if (LastUsedNs(*record) + kIdleNs <= now_ns) return;
    if (largest == nullptr || record->cache->host_bytes() > largest->cache->host_bytes()) {
      largest = record;
    }
  });
  return largest;
}

bool RowPlacement::FreeUntil(size_t bytes) {
  while (bytes_free() < bytes) {
    SequenceRecord* record = WhoseRowsGo();
    const size_t piece = std::min(kPieceBytes, bytes - bytes_free());
    if (record != nullptr && record->cache->MoveToHost(piece)) continue;
    record = WhoGoesWhole();
    if (record == nullptr || !record->cache->MoveAllToHost()) return false;
  }
  return true;
}

void RowPlacement::MakeRoom(size_t bytes) {
  if (is_enabled()) FreeUntil(bytes_free() + std::max(bytes, kStepBytes));
}

void RowPlacement::Step() {
  if (!is_enabled()) return;
  const size_t high = Share(kFreeHigh);
  frees_ = bytes_free() < (frees_ ? high : Share(kFreeLow));
  const bool has_to_spare = bytes_free() > Share(kFreeToSpare);
  if (!frees_ && !has_to_spare) return;
  const uint64_t now_ns = clock_->SteadyNowNs();
  if (now_ns < next_ns_) return;
  bool has_moved = false;
  if (frees_) {
    has_moved = FreeUntil(std::min(high, bytes_free() + kStepBytes));
  } else if (SequenceRecord* const record = WhoseRowsComeBack(); record != nullptr) {
    const size_t piece = std::min(kStepBytes, bytes_free() - Share(kFreeToSpare));
    has_moved = record->cache->MoveToDevice(piece);
  }
  if (!has_moved) next_ns_ = now_ns + kRetryNs;
}

}  // namespace kvservice
