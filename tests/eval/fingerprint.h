// A hash that tells files apart that were not made to deceive.

#ifndef KVSERVICE_TESTS_EVAL_FINGERPRINT_H_
#define KVSERVICE_TESTS_EVAL_FINGERPRINT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvservice::eval {

inline constexpr uint64_t kFingerprintStart = 0xcbf29ce484222325U;

// The fingerprint of what `before` stands for, followed by `size` bytes; FNV-1a over 8 bytes at a
// time, folded because a product only carries upwards.
inline uint64_t Fingerprint(uint64_t before, const void* data, size_t size) {
  constexpr uint64_t kPrime = 0x100000001b3U;
  const auto* bytes = static_cast<const std::byte*>(data);
  uint64_t hash = before;
  for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min(sizeof(word), size - i));
    hash = (hash ^ word) * kPrime;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_FINGERPRINT_H_
