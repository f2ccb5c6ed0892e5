// The random number seam: ids and secrets. Tests replace it with a seeded generator.

#ifndef KVSERVICE_KVSERVICE_RANDOM_H_
#define KVSERVICE_KVSERVICE_RANDOM_H_

#include <cstddef>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace kvservice {

// Thread-safe.
class Random {
 public:
  virtual ~Random() = default;
  // Fills `bytes` with unpredictable bytes. UNAVAILABLE if the source fails; the bytes must then
  // not be used.
  virtual absl::Status Fill(absl::Span<std::byte> bytes) = 0;
};

// The operating system's generator (getrandom).
Random* SystemRandom();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_RANDOM_H_
