// How much of the pool each owner has, may have at most, and has reserved: what others cannot take,
// whether it is used or not. A block counts once for its owner, however many sequences share it.
// One thread.

#ifndef KVSERVICE_KVSERVICE_CACHE_OWNER_ACCOUNTS_H_
#define KVSERVICE_KVSERVICE_CACHE_OWNER_ACCOUNTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvservice/cache/block_owners.h"

namespace kvservice {

struct OwnerLimits {
  size_t bytes_max = SIZE_MAX;
  size_t bytes_reserved = 0;
};

struct OwnerAccount {
  OwnerLimits limits;
  size_t bytes = 0;
  uint64_t blocks = 0;

  // Reserved and not used.
  size_t bytes_held() const {
    return limits.bytes_reserved > bytes ? limits.bytes_reserved - bytes : 0;
  }
};

class OwnerAccounts {
 public:
  // Owner 0 has no limits. Others have these until they get their own; the defaults reserve
  // nothing.
  void SetDefaults(const OwnerLimits& limits);
  void SetLimits(BlockOwner owner, const OwnerLimits& limits);

  void Take(BlockOwner owner, size_t bytes);
  void Return(BlockOwner owner, size_t bytes);

  // By how much `bytes` more would go beyond the owner's maximum; 0 = they would not.
  size_t BeyondMax(BlockOwner owner, size_t bytes) const;
  // Bytes that are kept free for everybody but the owner.
  size_t HeldFromOwner(BlockOwner owner) const { return bytes_held_ - Of(owner).bytes_held(); }
  // Bytes that are kept free, and all that are reserved.
  size_t bytes_held() const { return bytes_held_; }
  size_t bytes_reserved() const { return bytes_reserved_; }

  OwnerAccount Of(BlockOwner owner) const;
  // Owners are numbered below this.
  BlockOwner end() const { return static_cast<BlockOwner>(accounts_.size()); }

 private:
  // Made with the defaults at first use.
  OwnerAccount* Account(BlockOwner owner);

  OwnerLimits defaults_;
  // By owner.
  std::vector<OwnerAccount> accounts_;
  // [accounts_] whether SetLimits was called.
  std::vector<bool> has_own_limits_;
  size_t bytes_held_ = 0;
  size_t bytes_reserved_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_OWNER_ACCOUNTS_H_
