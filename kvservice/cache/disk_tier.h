// The disk tier as its users see it: rows under keys, changed by batches that are applied whole or
// not at all, and a record of how the store was closed.
//
// Who knows what. The tier knows keys and opaque values. What values say, and that a sequence's
// rows fit each other, is checked by those who wrote them; the tier adds that nothing vanishes
// unnoticed between a close and the next open (ClosedStore).

#ifndef KVSERVICE_KVSERVICE_CACHE_DISK_TIER_H_
#define KVSERVICE_KVSERVICE_CACHE_DISK_TIER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace kvservice {

// In the order: removals, then puts.
struct TierBatch {
  std::vector<std::pair<std::string, std::string>> removed_ranges;  // [begin, end)
  std::vector<std::pair<std::string, std::string>> puts;            // key, value

  bool empty() const { return removed_ranges.empty() && puts.empty(); }
  size_t bytes() const {
    size_t bytes = 0;
    for (const auto& [begin, end] : removed_ranges) bytes += begin.size() + end.size();
    for (const auto& [key, value] : puts) bytes += key.size() + value.size();
    return bytes;
  }
};

// How the store was left, as found when it was opened.
struct ClosedStore {
  // It was closed by Close, and nothing was written since.
  bool is_clean = false;
  // What Close was given; empty unless is_clean.
  std::string inventory;
  // Times that the store was opened after it had not been closed, this one included.
  uint64_t crash_count = 0;
};

// One thread at a time. An error of Commit or Close ends all writing: a store that once failed to
// write is not written to again until it has been opened anew.
class DiskTier {
 public:
  virtual ~DiskTier() = default;
  virtual const ClosedStore& closed() const = 0;
  // Applies the batches in their order, all or none. With `is_synced` they and all before them
  // survive a power cut when this returns OK. UNAVAILABLE / DISK_FAILED, and then always.
  virtual absl::Status Commit(absl::Span<const TierBatch> batches, bool is_synced) = 0;
  // DATA_LOSS / ROW_LOST if the row is not there or damaged, UNAVAILABLE / DISK_FAILED if it cannot
  // be read now.
  virtual absl::StatusOr<std::string> Read(const std::string& key) const = 0;
  // All rows whose keys begin with `prefix`, in the order of their keys. DATA_LOSS / ROW_LOST if
  // some of them cannot be read: then others may be missing too.
  virtual absl::Status Scan(
      const std::string& prefix,
      absl::FunctionRef<void(absl::string_view key, absl::string_view value)> visit) const = 0;
  // Bytes of files, dead rows included.
  virtual uint64_t file_bytes() const = 0;
  // Gives room of dead rows back, unless there are damaged ones; slow.
  virtual absl::Status Compact() = 0;
  // Everything is on disk, and the next open finds `inventory`. Nothing may follow.
  virtual absl::Status Close(const std::string& inventory) = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_DISK_TIER_H_
