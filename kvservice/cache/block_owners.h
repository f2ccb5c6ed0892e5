// Tenants as the pool numbers them, and whose bytes lie where in an arena, free ranges included: a
// block that changes hands is cleared of what its last tenant left, and nothing is cleared that
// need not be. One thread.

#ifndef KVSERVICE_KVSERVICE_CACHE_BLOCK_OWNERS_H_
#define KVSERVICE_KVSERVICE_CACHE_BLOCK_OWNERS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"

namespace kvservice {

// A tenant as the pool counts them, from 1; 0 is nobody in particular.
using BlockOwner = uint32_t;

class BlockOwners {
 public:
  // The same for the same tenant, always. There are as many as tenants were ever seen.
  BlockOwner NumberOf(std::string_view tenant);
  // 0 for a tenant that was never seen.
  BlockOwner Find(std::string_view tenant) const {
    const auto found = numbers_.find(tenant);
    return found == numbers_.end() ? 0 : found->second;
  }
  // Calls `visit(tenant, number)` for all that were ever seen behind `after`, by name, until it is
  // false.
  template <typename Visit>
  void ForEachAfter(std::string_view after, Visit visit) const {
    for (auto next = numbers_.upper_bound(after); next != numbers_.end(); ++next) {
      if (!visit(next->first, next->second)) return;
    }
  }

 private:
  std::map<std::string, BlockOwner, std::less<>> numbers_;
};

// Who had each range of one arena last.
class LastOwners {
 public:
  // From now on the range is the owner's. `clear` is called for each part of it where another's
  // bytes lie.
  void Take(size_t offset, size_t bytes, BlockOwner owner,
            absl::FunctionRef<void(size_t offset, size_t bytes)> clear);

 private:
  struct Range {
    size_t end = 0;
    BlockOwner owner = 0;
  };

  // Disjoint ranges by their begin, as they were taken last; never taken = zero since start.
  std::map<size_t, Range> ranges_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_BLOCK_OWNERS_H_
