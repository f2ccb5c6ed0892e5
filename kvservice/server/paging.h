// Sizes of pages in lists.

#ifndef KVSERVICE_KVSERVICE_SERVER_PAGING_H_
#define KVSERVICE_KVSERVICE_SERVER_PAGING_H_

#include <algorithm>
#include <cstdint>

#include "absl/status/statusor.h"
#include "kvservice/error.h"

namespace kvservice {

inline constexpr int32_t kPageSizeDefault = 100;
inline constexpr int32_t kPageSizeMax = 1000;

// The number of entries to return; INVALID_ARGUMENT / PAGE_SIZE_NEGATIVE.
inline absl::StatusOr<uint32_t> PageSize(int32_t asked) {
  if (asked < 0) {
    return InvalidField("page_size", "PAGE_SIZE_NEGATIVE", "page_size must not be negative");
  }
  return static_cast<uint32_t>(asked == 0 ? kPageSizeDefault : std::min(asked, kPageSizeMax));
}

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_PAGING_H_
