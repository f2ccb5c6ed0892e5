// SHA-256 (FIPS 180-4), for digests that must mean the same on every machine, and HMAC-SHA-256
// (RFC 2104), for keys that nobody can guess without the secret. Value types; not thread-safe.

#ifndef KVSERVICE_KVSERVICE_SHA256_H_
#define KVSERVICE_KVSERVICE_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"

namespace kvservice {

class Sha256 {
 public:
  using Digest = std::array<std::byte, 32>;

  void Update(absl::Span<const std::byte> bytes);
  // Ends the message; the object is then spent.
  Digest Finish();

 private:
  void Compress(const std::byte* chunk);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t message_bytes_ = 0;
  std::array<std::byte, 64> chunk_{};
};

// One message under one key. A copy of a fresh object saves hashing the key again.
class HmacSha256 {
 public:
  // Keys longer than 64 bytes are hashed first, as the RFC says.
  explicit HmacSha256(absl::Span<const std::byte> key);

  void Update(absl::Span<const std::byte> bytes) { inner_.Update(bytes); }
  // Ends the message; the object is then spent.
  Sha256::Digest Finish();

 private:
  Sha256 inner_;
  Sha256 outer_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SHA256_H_
