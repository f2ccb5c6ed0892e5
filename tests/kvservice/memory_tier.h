// A disk tier whose rows are in memory and outlive it. One thread at a time.

#ifndef KVSERVICE_TESTS_KVSERVICE_MEMORY_TIER_H_
#define KVSERVICE_TESTS_KVSERVICE_MEMORY_TIER_H_

#include <map>
#include <string>

#include "kvservice/cache/disk_tier.h"

namespace kvservice::testing {

struct TierRows {
  std::map<std::string, std::string> by_key;
  ClosedStore closed;
};

class MemoryTier final : public DiskTier {
 public:
  explicit MemoryTier(TierRows* rows) : rows_(rows), closed_(rows->closed) {}
  const ClosedStore& closed() const override { return closed_; }
  absl::Status Commit(absl::Span<const TierBatch> batches, bool /*is_synced*/) override {
    for (const TierBatch& batch : batches) {
      for (const auto& [begin, end] : batch.removed_ranges) {
        rows_->by_key.erase(rows_->by_key.lower_bound(begin), rows_->by_key.lower_bound(end));
      }
      for (const auto& [key, value] : batch.puts) rows_->by_key[key] = value;
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Read(const std::string& key) const override {
    const auto found = rows_->by_key.find(key);
    if (found == rows_->by_key.end()) return absl::DataLossError("there is no such row");
    return found->second;
  }
  absl::Status Scan(
      const std::string& prefix,
      absl::FunctionRef<void(absl::string_view, absl::string_view)> visit) const override {
    for (const auto& [key, value] : rows_->by_key) {
      if (key.compare(0, prefix.size(), prefix) == 0) visit(key, value);
    }
    return absl::OkStatus();
  }
  uint64_t file_bytes() const override { return 0; }
  absl::Status Compact() override { return absl::OkStatus(); }
  absl::Status Close(const std::string& inventory) override {
    rows_->closed = {.is_clean = true, .inventory = inventory, .crash_count = 0};
    return absl::OkStatus();
  }

 private:
  TierRows* const rows_;
  const ClosedStore closed_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_KVSERVICE_MEMORY_TIER_H_
