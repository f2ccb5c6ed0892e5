#include "kvservice/cache/prefix_index.h"

#include <algorithm>
#include <cassert>

namespace kvservice {

PrefixIndex::~PrefixIndex() { assert(tenants_.empty()); }

PrefixIndex::Match PrefixIndex::Find(std::string_view tenant,
                                     absl::Span<const PrefixDigest> chain) const {
  const auto owner = tenants_.find(tenant);
  if (owner == tenants_.end()) return {};
  const auto& offers = owner->second.offers;
  const auto end =
      std::partition_point(chain.begin(), chain.end(),
                           [&](const PrefixDigest& digest) { return offers.contains(digest); });
  if (end == chain.begin()) return {};
  return {.source = offers.find(*(end - 1))->second.back()->record_,
          .block_count = static_cast<uint32_t>(end - chain.begin())};
}

std::unique_ptr<PrefixClaim> PrefixIndex::Declare(std::string_view tenant, SequenceRecord* record,
                                                  absl::Span<const PrefixDigest> chain) {
  const auto owner = tenants_.find(tenant);
  const uint64_t declared = owner == tenants_.end() ? 0 : owner->second.declared_blocks;
  const absl::Span<const PrefixDigest> taken =
      chain.subspan(0, static_cast<size_t>(blocks_per_tenant_max_ - declared));
  if (taken.empty()) return nullptr;
  Tenant& of = tenants_[std::string(tenant)];
  of.name = std::string(tenant);
  return std::unique_ptr<PrefixClaim>(new PrefixClaim(this, &of, record, taken));
}

PrefixClaim::PrefixClaim(PrefixIndex* index, PrefixIndex::Tenant* tenant, SequenceRecord* record,
                         absl::Span<const PrefixDigest> chain)
    : index_(index), tenant_(tenant), record_(record), chain_(chain.begin(), chain.end()) {
  ++tenant_->claim_count;
  tenant_->declared_blocks += chain_.size();
  index_->declared_blocks_ += chain_.size();
}

PrefixClaim::~PrefixClaim() {
  Cut(0);
  if (--tenant_->claim_count == 0) index_->tenants_.erase(index_->tenants_.find(tenant_->name));
}

void PrefixClaim::Offer(uint32_t block_count) {
  const size_t wanted = std::min<size_t>(block_count, chain_.size());
  while (places_.size() < wanted) {
    auto& sources = tenant_->offers[chain_[places_.size()]];
    places_.push_back(static_cast<uint32_t>(sources.size()));
    sources.push_back(this);
  }
  // The last of the others takes the free place. A digest stands for one number of blocks, so it is
  // at the same block of every chain.
  while (places_.size() > wanted) {
    const size_t block = places_.size() - 1;
    const auto found = tenant_->offers.find(chain_[block]);
    auto& sources = found->second;
    PrefixClaim* const last = sources.back();
    sources[places_[block]] = last;
    last->places_[block] = places_[block];
    sources.pop_back();
    places_.pop_back();
    if (sources.empty()) tenant_->offers.erase(found);
  }
}

void PrefixClaim::Cut(uint32_t block_count) {
  if (block_count >= chain_.size()) return;
  Offer(std::min(block_count, offered_count()));
  const uint64_t removed = chain_.size() - block_count;
  tenant_->declared_blocks -= removed;
  index_->declared_blocks_ -= removed;
  chain_.resize(block_count);
  chain_.shrink_to_fit();
}

}  // namespace kvservice
