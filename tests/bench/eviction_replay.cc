#include "tests/bench/eviction_replay.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_format.h"

namespace kvservice::bench {
namespace {

constexpr uint64_t kBlockTokens = 64;

// Blocks that some sequences in memory have together.
struct Segment {
  uint64_t blocks = 0;
  uint32_t users = 0;
};

struct Resident {
  std::vector<std::shared_ptr<Segment>> shared;
  uint64_t own_blocks = 0;

  uint64_t blocks() const {
    uint64_t sum = own_blocks;
    for (const auto& segment : shared) sum += segment->blocks;
    return sum;
  }
};

class Replayer {
 public:
  Replayer(const std::vector<Turn>& turns, uint64_t lease_ms, uint64_t capacity,
           EvictionPolicy* policy)
      : turns_(turns), lease_ms_(lease_ms), capacity_(capacity), policy_(policy) {}

  absl::StatusOr<ReplayCost> Run() {
    FindNextUses();
    for (size_t i = 0; i < turns_.size(); ++i) {
      EndExpired(turns_[i].time_ms);
      const absl::Status status = Step(turns_[i], next_uses_[i]);
      if (!status.ok()) return status;
    }
    return cost_;
  }

 private:
  // Whoever comes back later than its lease is somebody new.
  void FindNextUses() {
    next_uses_.assign(turns_.size(), UINT64_MAX);
    std::unordered_map<SequenceNumber, size_t> later;
    for (size_t i = turns_.size(); i-- > 0;) {
      const auto found = later.find(turns_[i].sequence);
      const bool comes_again = found != later.end() && !turns_[i].is_last &&
                               turns_[found->second].time_ms <= turns_[i].time_ms + lease_ms_;
      if (comes_again) next_uses_[i] = found->second;
      later[turns_[i].sequence] = i;
    }
  }

  absl::Status Step(const Turn& turn, uint64_t next_use) {
    ++cost_.turns;
    Use(turn);
    const SequenceNumber sequence = turn.sequence;
    const uint64_t blocks = (turn.tokens + kBlockTokens - 1) / kBlockTokens;
    Grow(sequence, blocks);
    policy_->Used({.sequence = sequence, .blocks = blocks, .next_use = next_use});
    while (used_ > capacity_ && resident_.size() > 1) Leave(policy_->Evict(sequence));
    if (used_ > capacity_ && resident_.size() > 1) {
      return absl::InternalError(
          absl::StrFormat("%d of %d blocks are in memory", used_, capacity_));
    }
    cost_.blocks_max = std::max(cost_.blocks_max, used_);
    if (turn.is_last) End(sequence);
    return absl::OkStatus();
  }

  // It is in memory afterwards, as it was.
  void Use(const Turn& turn) {
    const SequenceNumber sequence = turn.sequence;
    SetExpiry(sequence, turn.time_ms + lease_ms_);
    if (const auto found = resident_.find(sequence); found != resident_.end()) {
      cost_.blocks_asked += found->second.blocks();
      return;
    }
    Resident* const entry = &resident_[sequence];
    if (const auto found = on_disk_.find(sequence); found != on_disk_.end()) {
      cost_.blocks_asked += found->second;
      cost_.blocks_loaded += found->second;
      ++cost_.turns_that_waited;
      entry->own_blocks = found->second;
      used_ += found->second;
      on_disk_.erase(found);
      return;
    }
    if (turn.parent.has_value()) Fork(*turn.parent, entry);
  }

  // Of a parent that is not in memory any more nothing is shared.
  void Fork(SequenceNumber parent, Resident* child) {
    const auto found = resident_.find(parent);
    if (found == resident_.end()) return;
    Resident* const from = &found->second;
    if (from->own_blocks > 0) {
      from->shared.push_back(std::make_shared<Segment>(Segment{from->own_blocks, 1}));
      from->own_blocks = 0;
    }
    child->shared = from->shared;
    for (const auto& segment : child->shared) ++segment->users;
  }

  void Grow(SequenceNumber sequence, uint64_t blocks) {
    Resident* const entry = &resident_[sequence];
    const uint64_t before = entry->blocks();
    if (blocks <= before) return;
    entry->own_blocks += blocks - before;
    used_ += blocks - before;
  }

  void Release(const Resident& entry) {
    used_ -= entry.own_blocks;
    for (const auto& segment : entry.shared) {
      if (--segment->users == 0) used_ -= segment->blocks;
    }
  }

  void Leave(SequenceNumber sequence) {
    const auto found = resident_.find(sequence);
    const uint64_t blocks = found->second.blocks();
    uint64_t& stored = stored_[sequence];
    cost_.blocks_written += blocks - std::min(stored, blocks);
    stored = std::max(stored, blocks);
    on_disk_[sequence] = blocks;
    Release(found->second);
    resident_.erase(found);
  }

  void End(SequenceNumber sequence) {
    policy_->Ended(sequence);
    if (const auto found = resident_.find(sequence); found != resident_.end()) {
      Release(found->second);
      resident_.erase(found);
    }
    on_disk_.erase(sequence);
    stored_.erase(sequence);
    if (const auto found = expiry_of_.find(sequence); found != expiry_of_.end()) {
      expiries_.erase({found->second, sequence});
      expiry_of_.erase(found);
    }
  }

  void SetExpiry(SequenceNumber sequence, uint64_t time_ms) {
    const auto [found, is_new] = expiry_of_.try_emplace(sequence, time_ms);
    if (!is_new) expiries_.erase({found->second, sequence});
    found->second = time_ms;
    expiries_.insert({time_ms, sequence});
  }
  void EndExpired(uint64_t now_ms) {
    while (!expiries_.empty() && expiries_.begin()->first < now_ms) End(expiries_.begin()->second);
  }

  const std::vector<Turn>& turns_;
  const uint64_t lease_ms_;
  const uint64_t capacity_;
  EvictionPolicy* const policy_;

  std::vector<uint64_t> next_uses_;
  std::map<SequenceNumber, Resident> resident_;
  // Blocks of those that are there and not in memory, and blocks that are stored of any.
  std::unordered_map<SequenceNumber, uint64_t> on_disk_;
  std::unordered_map<SequenceNumber, uint64_t> stored_;
  std::set<std::pair<uint64_t, SequenceNumber>> expiries_;
  std::unordered_map<SequenceNumber, uint64_t> expiry_of_;
  uint64_t used_ = 0;
  ReplayCost cost_;
};

}  // namespace

absl::StatusOr<ReplayCost> Replay(const std::vector<Turn>& turns, uint64_t lease_ms,
                                  uint64_t capacity_blocks, std::string_view policy) {
  const std::unique_ptr<EvictionPolicy> made = NewEvictionPolicy(policy, capacity_blocks);
  if (made == nullptr) return absl::InvalidArgumentError("there is no such policy");
  return Replayer(turns, lease_ms, capacity_blocks, made.get()).Run();
}

}  // namespace kvservice::bench
