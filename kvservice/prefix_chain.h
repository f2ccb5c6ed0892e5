// The digests that stand for token prefixes of a tenant's sequences
// (kvservice/cache/prefix_index.h). The first of a chain comes from what the tokens are of, under a
// secret of this process:
//
//     start     = HMAC-SHA-256(secret, tag | tenant length | tenant | model fingerprint |
//                              sketch table digest)
//     digest[0] = SHA-256(start | ids of tokens 0 to 63)
//     digest[i] = SHA-256(digest[i - 1] | ids of tokens 64 i to 64 i + 63)
//
//   tag                  18 bytes "kvservice.prefix.1"
//   tenant length        8 bytes, little endian, so that no two tenants make one message
//   model fingerprint    8 bytes, little endian: name, geometry, cache dtype, registered tables
//   sketch table digest  32 bytes: sequences of another version have other sketches
//   ids                  4 bytes each, little endian
//
// The tenant is the one that the connection's identity says; no field of a request gets in. So two
// tenants' digests never meet, and a tenant can neither make nor recognise another's. A chain costs
// the same whatever anybody has cached.
//
// Immutable after construction; any thread.

#ifndef KVSERVICE_KVSERVICE_PREFIX_CHAIN_H_
#define KVSERVICE_KVSERVICE_PREFIX_CHAIN_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "kvservice/cache/prefix_index.h"
#include "kvservice/sha256.h"

namespace kvservice {

using PrefixSecret = std::array<std::byte, 32>;

class PrefixChains {
 public:
  explicit PrefixChains(const PrefixSecret& secret) : keyed_(secret) {}

  // One digest per whole block of `token_ids`, at most `blocks_max`.
  std::vector<PrefixDigest> Of(std::string_view tenant, uint64_t model_fingerprint,
                               const Sha256::Digest& table_digest,
                               absl::Span<const uint32_t> token_ids, uint64_t blocks_max) const;

 private:
  // Has taken the key, and nothing of a message.
  HmacSha256 keyed_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_PREFIX_CHAIN_H_
