// Keys of the random numbers behind sampled certificates (attention/draws.h).
//
// A sampled bound holds with probability 1 - eta over these numbers, so whoever shapes keys, values
// and queries may neither predict nor repeat them. The key of one row of one call is
//
//     HMAC-SHA-256(secret, tag | epoch | call number | row | sequence id | layer)
//
//   tag           16 bytes "kvservice.draw.1"
//   epoch         16 random bytes made at start: one secret may serve several processes
//   call number   8 bytes, big endian; counts the calls of a process from 1, so 2^64 never come
//   row           4 bytes, big endian: index of the row in its call
//   sequence id   16 bytes
//   layer         4 bytes, big endian
//
// Every field has a fixed width, so different inputs are different messages, and no two rows share
// a key. The secret's id names the secret without telling it: a reply carries id, epoch and call
// number, and with them and the secret its numbers can be made again.
//
// Immutable after construction; any thread.

#ifndef KVSERVICE_KVSERVICE_DRAW_KEYS_H_
#define KVSERVICE_KVSERVICE_DRAW_KEYS_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "attention/draws.h"
#include "kvservice/sha256.h"

namespace kvservice {

inline constexpr size_t kDrawSecretBytes = 32;
inline constexpr size_t kEpochBytes = 16;
using DrawSecret = std::array<std::byte, kDrawSecretBytes>;
using Epoch = std::array<std::byte, kEpochBytes>;

class DrawKeys {
 public:
  DrawKeys(const DrawSecret& secret, const Epoch& epoch);

  // id: the 16 bytes of a sequence's id.
  std::array<std::byte, kDrawKeyBytes> KeyOf(uint64_t call_number, uint32_t row,
                                             absl::Span<const std::byte> sequence_id,
                                             uint32_t layer) const;
  const Epoch& epoch() const { return epoch_; }
  // The first 8 bytes, big endian, of SHA-256("kvservice.draw.secret.id" | secret).
  uint64_t secret_id() const { return secret_id_; }

 private:
  Epoch epoch_;
  uint64_t secret_id_;
  // Has taken the key, and nothing of a message.
  HmacSha256 keyed_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DRAW_KEYS_H_
