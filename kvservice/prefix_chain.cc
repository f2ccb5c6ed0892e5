#include "kvservice/prefix_chain.h"

#include <algorithm>
#include <bit>

#include "attention/kv_layout.h"

namespace kvservice {
namespace {

constexpr std::string_view kTag = "kvservice.prefix.1";

// Ids are hashed as they lie in memory.
static_assert(std::endian::native == std::endian::little);

absl::Span<const std::byte> BytesOf(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

absl::Span<const std::byte> BytesOf(const uint64_t& number) {
  return {reinterpret_cast<const std::byte*>(&number), sizeof(number)};
}

absl::Span<const std::byte> BytesOf(absl::Span<const uint32_t> ids) {
  return {reinterpret_cast<const std::byte*>(ids.data()), ids.size() * sizeof(uint32_t)};
}

}  // namespace

std::vector<PrefixDigest> PrefixChains::Of(std::string_view tenant, uint64_t model_fingerprint,
                                           const Sha256::Digest& table_digest,
                                           absl::Span<const uint32_t> token_ids,
                                           uint64_t blocks_max) const {
  HmacSha256 start = keyed_;
  start.Update(BytesOf(kTag));
  start.Update(BytesOf(uint64_t{tenant.size()}));
  start.Update(BytesOf(tenant));
  start.Update(BytesOf(model_fingerprint));
  start.Update(table_digest);
  PrefixDigest digest = start.Finish();
  std::vector<PrefixDigest> chain(std::min<uint64_t>(token_ids.size() / kBlockTokens, blocks_max));
  for (size_t block = 0; block < chain.size(); ++block) {
    Sha256 next;
    next.Update(digest);
    next.Update(BytesOf(token_ids.subspan(block * kBlockTokens, kBlockTokens)));
    digest = next.Finish();
    chain[block] = digest;
  }
  return chain;
}

}  // namespace kvservice
