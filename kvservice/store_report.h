// What a look through the disk tier found. Plain data.

#ifndef KVSERVICE_KVSERVICE_STORE_REPORT_H_
#define KVSERVICE_KVSERVICE_STORE_REPORT_H_

#include <cstdint>

namespace kvservice {

struct StoreReport {
  // Sequences whose rows were read, those that were lost included, and those that were passed by
  // because they were on their way between memory and disk.
  uint64_t sequences_checked = 0;
  uint64_t sequences_skipped = 0;
  // A row of theirs was damaged or gone, and memory does not have it: they answer DATA_LOSS now.
  uint64_t sequences_lost = 0;
  uint64_t slices_checked = 0;
  // Rows of any kind that were damaged or gone, and how many of those were written again from
  // memory.
  uint64_t rows_damaged = 0;
  uint64_t rows_mended = 0;
  uint64_t bytes_read = 0;

  friend bool operator==(const StoreReport&, const StoreReport&) = default;
};

// Of all looks since the start.
struct ScrubStats {
  StoreReport report;
  // Looks that came to their end.
  uint64_t passes = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORE_REPORT_H_
