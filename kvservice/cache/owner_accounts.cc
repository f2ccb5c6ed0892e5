#include "kvservice/cache/owner_accounts.h"

#include <cassert>

namespace kvservice {

void OwnerAccounts::SetDefaults(const OwnerLimits& limits) {
  assert(limits.bytes_reserved == 0);
  defaults_ = limits;
  for (BlockOwner owner = 1; owner < end(); ++owner) {
    if (!has_own_limits_[owner]) accounts_[owner].limits = limits;
  }
}

void OwnerAccounts::SetLimits(BlockOwner owner, const OwnerLimits& limits) {
  OwnerAccount* const account = Account(owner);
  bytes_held_ -= account->bytes_held();
  bytes_reserved_ -= account->limits.bytes_reserved;
  account->limits = limits;
  has_own_limits_[owner] = true;
  bytes_held_ += account->bytes_held();
  bytes_reserved_ += limits.bytes_reserved;
}

void OwnerAccounts::Take(BlockOwner owner, size_t bytes) {
  OwnerAccount* const account = Account(owner);
  bytes_held_ -= account->bytes_held();
  account->bytes += bytes;
  ++account->blocks;
  bytes_held_ += account->bytes_held();
}

void OwnerAccounts::Return(BlockOwner owner, size_t bytes) {
  OwnerAccount* const account = Account(owner);
  assert(account->bytes >= bytes && account->blocks > 0);
  bytes_held_ -= account->bytes_held();
  account->bytes -= bytes;
  --account->blocks;
  bytes_held_ += account->bytes_held();
}

size_t OwnerAccounts::BeyondMax(BlockOwner owner, size_t bytes) const {
  const OwnerAccount account = Of(owner);
  const size_t max = account.limits.bytes_max;
  if (account.bytes >= max) return account.bytes - max + bytes;
  return bytes > max - account.bytes ? bytes - (max - account.bytes) : 0;
}

OwnerAccount OwnerAccounts::Of(BlockOwner owner) const {
  if (owner < end()) return accounts_[owner];
  return {.limits = owner == 0 ? OwnerLimits() : defaults_, .bytes = 0, .blocks = 0};
}

OwnerAccount* OwnerAccounts::Account(BlockOwner owner) {
  while (end() <= owner) {
    accounts_.push_back(Of(end()));
    has_own_limits_.push_back(false);
  }
  return &accounts_[owner];
}

}  // namespace kvservice
