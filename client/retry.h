// When and after how long a failed call is repeated. Inside the library only.

#ifndef KVSERVICE_CLIENT_RETRY_H_
#define KVSERVICE_CLIENT_RETRY_H_

#include <chrono>
#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "client/options.h"

namespace kvservice::client {

enum class Repeat : uint8_t {
  // Repeating has the same effect as calling once.
  kAlways,
  // Only after an answer that the service itself gave, with a reason: then nothing ran. Of a broken
  // connection nobody knows how far the call came.
  kIfRefused,
};

// The pauses of one call. One thread.
class Backoff {
 public:
  // Any two seeds, also neighbours, give different pauses.
  Backoff(const RetryOptions& options, Repeat repeat, uint64_t seed)
      : options_(options), repeat_(repeat), backoff_(options.backoff_first), random_(seed) {}

  // Pause before the next attempt, shorter than `remaining`; nothing when `status` is final.
  std::optional<std::chrono::milliseconds> Next(const absl::Status& status,
                                                std::chrono::milliseconds remaining);

 private:
  const RetryOptions options_;
  const Repeat repeat_;
  uint32_t attempts_ = 0;
  std::chrono::milliseconds backoff_;
  uint64_t random_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_RETRY_H_
