// Which sequences have the tokens that a new one asks for: digests of token prefixes, and who has
// them. Plain bookkeeping; it sees neither tokens nor keys nor values.
//
// A sequence declares a chain of digests, one per block of its prompt; each stands for all tokens
// up to the end of its block (kvservice/prefix_chain.h). It offers the first so many blocks of the
// chain, those that it has whole in every layer. So whoever offers a digest offers all before it in
// the chain, and the digests of a chain that somebody offers come first: the end of the longest
// match is found by bisection.
//
// Tenants have nothing in common here, not even a table: what one has changes no other's answers,
// limits or time.
//
// Belongs to the executor thread. The index outlives its claims.

#ifndef KVSERVICE_KVSERVICE_CACHE_PREFIX_INDEX_H_
#define KVSERVICE_KVSERVICE_CACHE_PREFIX_INDEX_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"

namespace kvservice {

// A keyed digest: nobody without the key can make one, or choose any of its bits.
using PrefixDigest = std::array<std::byte, 32>;

// Who has the tokens; never looked into here.
struct SequenceRecord;
class PrefixClaim;

class PrefixIndex {
 public:
  // What a tenant's sequences may declare in all; beyond that the rest of a chain is left out.
  explicit PrefixIndex(uint64_t blocks_per_tenant_max)
      : blocks_per_tenant_max_(blocks_per_tenant_max) {}
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  struct Match {
    SequenceRecord* source = nullptr;  // nullptr = nobody has the first block
    uint32_t block_count = 0;
  };
  // A sequence of the tenant's that offers as much of the chain as any does.
  Match Find(std::string_view tenant, absl::Span<const PrefixDigest> chain) const;

  // Nothing is offered yet. nullptr if nothing of the chain may be declared.
  std::unique_ptr<PrefixClaim> Declare(std::string_view tenant, SequenceRecord* record,
                                       absl::Span<const PrefixDigest> chain);
  // Of all tenants' sequences.
  uint64_t declared_blocks() const { return declared_blocks_; }

 private:
  friend class PrefixClaim;

  struct FirstBytes {
    size_t operator()(const PrefixDigest& digest) const {
      size_t hash = 0;
      std::memcpy(&hash, digest.data(), sizeof(hash));
      return hash;
    }
  };
  struct Tenant {
    std::string name;
    uint32_t claim_count = 0;
    uint64_t declared_blocks = 0;
    // Whoever offers a digest; never empty.
    std::unordered_map<PrefixDigest, absl::InlinedVector<PrefixClaim*, 1>, FirstBytes> offers;
  };

  const uint64_t blocks_per_tenant_max_;
  uint64_t declared_blocks_ = 0;
  // Those with claims.
  std::map<std::string, Tenant, std::less<>> tenants_;
};

// What one sequence has declared, for as long as the object lives.
class PrefixClaim {
 public:
  ~PrefixClaim();
  PrefixClaim(const PrefixClaim&) = delete;
  PrefixClaim& operator=(const PrefixClaim&) = delete;

  absl::Span<const PrefixDigest> chain() const { return chain_; }
  uint32_t offered_count() const { return static_cast<uint32_t>(places_.size()); }
  bool offers_all() const { return places_.size() == chain_.size(); }

  // From now on the first `block_count` blocks of the chain are offered, or all if it has fewer.
  void Offer(uint32_t block_count);
  // Forgets the chain behind `block_count` blocks: what follows them is no longer known.
  void Cut(uint32_t block_count);

 private:
  friend class PrefixIndex;
  PrefixClaim(PrefixIndex* index, PrefixIndex::Tenant* tenant, SequenceRecord* record,
              absl::Span<const PrefixDigest> chain);

  PrefixIndex* const index_;
  PrefixIndex::Tenant* const tenant_;
  SequenceRecord* const record_;
  std::vector<PrefixDigest> chain_;
  // [offered] Where this claim stands among those that offer the digest, so that leaving them takes
  // as long however many there are.
  std::vector<uint32_t> places_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_PREFIX_INDEX_H_
