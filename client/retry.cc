#include "client/retry.h"

#include <algorithm>

#include "client/status.h"

namespace kvservice::client {
namespace {

// splitmix64: one well-mixed number per state, so that neighbouring seeds share nothing.
uint64_t NextRandom(uint64_t* state) {
  *state += 0x9e3779b97f4a7c15;
  uint64_t x = *state;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

std::optional<std::chrono::milliseconds> Backoff::Next(const absl::Status& status,
                                                       std::chrono::milliseconds remaining) {
  if (status.code() != absl::StatusCode::kUnavailable) return std::nullopt;
  if (++attempts_ >= options_.attempts_max) return std::nullopt;
  if (repeat_ == Repeat::kIfRefused && ReasonOf(status).empty()) return std::nullopt;

  const auto whole = static_cast<uint64_t>(std::max<int64_t>(0, backoff_.count()));
  const uint64_t jitter = NextRandom(&random_) % (whole - whole / 2 + 1);
  std::chrono::milliseconds pause(whole / 2 + jitter);
  backoff_ = std::min(2 * backoff_, options_.backoff_max);
  pause = std::max(pause, RetryDelayOf(status).value_or(std::chrono::milliseconds(0)));
  if (pause >= remaining) return std::nullopt;
  return pause;
}

}  // namespace kvservice::client
