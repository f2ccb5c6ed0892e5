#include "tests/bench/eviction_policy.h"

#include <algorithm>
#include <list>
#include <set>
#include <unordered_map>
#include <utility>

namespace kvservice::bench {
namespace {

// Sequences in an order, with their blocks.
class Queue {
 public:
  bool Contains(SequenceNumber sequence) const { return places_.contains(sequence); }
  bool empty() const { return order_.empty(); }
  uint64_t blocks() const { return blocks_; }
  uint64_t BlocksOf(SequenceNumber sequence) const { return places_.at(sequence)->second; }

  void PushFront(SequenceNumber sequence, uint64_t blocks) {
    order_.emplace_front(sequence, blocks);
    places_[sequence] = order_.begin();
    blocks_ += blocks;
  }
  // Leaves it where it is.
  void Resize(SequenceNumber sequence, uint64_t blocks) {
    const auto place = places_.at(sequence);
    blocks_ += blocks - place->second;
    place->second = blocks;
  }
  // True if it was there.
  bool Remove(SequenceNumber sequence) {
    const auto found = places_.find(sequence);
    if (found == places_.end()) return false;
    blocks_ -= found->second->second;
    order_.erase(found->second);
    places_.erase(found);
    return true;
  }
  SequenceNumber last() const { return order_.back().first; }
  // The last but `keep`; false if there is none.
  bool FindLast(SequenceNumber keep, SequenceNumber* found) const {
    const auto last = std::find_if(order_.rbegin(), order_.rend(),
                                   [keep](const auto& entry) { return entry.first != keep; });
    if (last == order_.rend()) return false;
    *found = last->first;
    return true;
  }

 private:
  using Order = std::list<std::pair<SequenceNumber, uint64_t>>;
  Order order_;
  std::unordered_map<SequenceNumber, Order::iterator> places_;
  uint64_t blocks_ = 0;
};

class Lru final : public EvictionPolicy {
 public:
  void Used(const Use& use) override {
    queue_.Remove(use.sequence);
    queue_.PushFront(use.sequence, use.blocks);
  }
  void Ended(SequenceNumber sequence) override { queue_.Remove(sequence); }
  SequenceNumber Evict(SequenceNumber keep) override {
    SequenceNumber victim = keep;
    queue_.FindLast(keep, &victim);
    queue_.Remove(victim);
    return victim;
  }

 private:
  Queue queue_;
};

class S3Fifo final : public EvictionPolicy {
 public:
  S3Fifo(uint64_t capacity, uint32_t uses_for_promotion)
      : small_max_(capacity / 10),
        ghosts_max_(capacity - small_max_),
        uses_for_promotion_(uses_for_promotion) {}

  void Used(const Use& use) override {
    for (Queue* const queue : {&small_, &main_}) {
      if (!queue->Contains(use.sequence)) continue;
      queue->Resize(use.sequence, use.blocks);
      uint32_t& uses = uses_[use.sequence];
      uses = std::min(uses + 1, kUsesMax);
      return;
    }
    uses_[use.sequence] = 0;
    (ghosts_.Remove(use.sequence) ? main_ : small_).PushFront(use.sequence, use.blocks);
  }
  void Ended(SequenceNumber sequence) override {
    for (Queue* const queue : {&small_, &main_, &ghosts_}) queue->Remove(sequence);
    uses_.erase(sequence);
  }
  SequenceNumber Evict(SequenceNumber keep) override {
    for (;;) {
      SequenceNumber of_small = keep;
      SequenceNumber of_main = keep;
      const bool has_small = small_.FindLast(keep, &of_small);
      const bool has_main = main_.FindLast(keep, &of_main);
      const bool from_small = has_small && (small_.blocks() >= small_max_ || !has_main);
      const SequenceNumber sequence = from_small ? of_small : of_main;
      Queue* const queue = from_small ? &small_ : &main_;
      const uint64_t blocks = queue->BlocksOf(sequence);
      uint32_t& uses = uses_[sequence];
      queue->Remove(sequence);
      if (from_small && uses >= uses_for_promotion_) {
        uses = 0;
        main_.PushFront(sequence, blocks);
      } else if (!from_small && uses > 0) {
        --uses;
        main_.PushFront(sequence, blocks);
      } else {
        uses_.erase(sequence);
        if (from_small) Remember(sequence, blocks);
        return sequence;
      }
    }
  }

 private:
  static constexpr uint32_t kUsesMax = 3;

  void Remember(SequenceNumber sequence, uint64_t blocks) {
    ghosts_.PushFront(sequence, blocks);
    while (ghosts_.blocks() > ghosts_max_) ghosts_.Remove(ghosts_.last());
  }

  const uint64_t small_max_;
  const uint64_t ghosts_max_;
  const uint32_t uses_for_promotion_;
  Queue small_, main_, ghosts_;
  // Of those in memory, since they came or were promoted.
  std::unordered_map<SequenceNumber, uint32_t> uses_;
};

class Arc final : public EvictionPolicy {
 public:
  explicit Arc(uint64_t capacity) : capacity_(capacity) {}

  void Used(const Use& use) override {
    bool is_new = true;
    if (once_.Remove(use.sequence) || often_.Remove(use.sequence)) {
      is_new = false;
    } else if (once_ghosts_.Contains(use.sequence)) {
      const double times = Ratio(often_ghosts_, once_ghosts_);
      target_ = std::min(static_cast<double>(capacity_),
                         target_ + times * static_cast<double>(use.blocks));
      once_ghosts_.Remove(use.sequence);
      is_new = false;
    } else if (often_ghosts_.Contains(use.sequence)) {
      const double times = Ratio(once_ghosts_, often_ghosts_);
      target_ = std::max(0.0, target_ - times * static_cast<double>(use.blocks));
      often_ghosts_.Remove(use.sequence);
      is_new = false;
    }
    (is_new ? once_ : often_).PushFront(use.sequence, use.blocks);
  }
  void Ended(SequenceNumber sequence) override {
    for (Queue* const queue : {&once_, &often_, &once_ghosts_, &often_ghosts_}) {
      queue->Remove(sequence);
    }
  }
  SequenceNumber Evict(SequenceNumber keep) override {
    SequenceNumber of_once = keep;
    SequenceNumber of_often = keep;
    const bool has_once = once_.FindLast(keep, &of_once);
    const bool has_often = often_.FindLast(keep, &of_often);
    const bool is_large = static_cast<double>(once_.blocks()) > target_;
    const bool from_once = has_once && (is_large || !has_often);
    const SequenceNumber victim = from_once ? of_once : of_often;
    Queue* const queue = from_once ? &once_ : &often_;
    (from_once ? once_ghosts_ : often_ghosts_).PushFront(victim, queue->BlocksOf(victim));
    queue->Remove(victim);
    while (!once_ghosts_.empty() && once_.blocks() + once_ghosts_.blocks() > capacity_) {
      once_ghosts_.Remove(once_ghosts_.last());
    }
    while (!often_ghosts_.empty() && often_ghosts_.blocks() + once_ghosts_.blocks() > capacity_) {
      often_ghosts_.Remove(often_ghosts_.last());
    }
    return victim;
  }

 private:
  static double Ratio(const Queue& a, const Queue& b) {
    return std::max(1.0, static_cast<double>(a.blocks()) /
                             static_cast<double>(std::max<uint64_t>(1, b.blocks())));
  }

  const uint64_t capacity_;
  // Blocks that those used once should have.
  double target_ = 0.0;
  Queue once_, often_, once_ghosts_, often_ghosts_;
};

class Belady final : public EvictionPolicy {
 public:
  void Used(const Use& use) override {
    Ended(use.sequence);
    next_uses_[use.sequence] = use.next_use;
    order_.insert({use.next_use, use.sequence});
  }
  void Ended(SequenceNumber sequence) override {
    const auto found = next_uses_.find(sequence);
    if (found == next_uses_.end()) return;
    order_.erase({found->second, sequence});
    next_uses_.erase(found);
  }
  SequenceNumber Evict(SequenceNumber keep) override {
    auto last = std::prev(order_.end());
    if (last->second == keep) --last;
    const SequenceNumber victim = last->second;
    Ended(victim);
    return victim;
  }

 private:
  std::unordered_map<SequenceNumber, uint64_t> next_uses_;
  std::set<std::pair<uint64_t, SequenceNumber>> order_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> NewEvictionPolicy(std::string_view name, uint64_t capacity) {
  if (name == "lru") return std::make_unique<Lru>();
  if (name == "s3fifo") return std::make_unique<S3Fifo>(capacity, 2);
  if (name == "s3fifo_once") return std::make_unique<S3Fifo>(capacity, 1);
  if (name == "arc") return std::make_unique<Arc>(capacity);
  if (name == "belady") return std::make_unique<Belady>();
  return nullptr;
}

const std::vector<std::string>& EvictionPolicyNames() {
  static const auto* const kNames =
      new std::vector<std::string>{"lru", "s3fifo", "s3fifo_once", "arc", "belady"};
  return *kNames;
}

}  // namespace kvservice::bench
