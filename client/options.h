// How a client connects, waits and repeats. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_OPTIONS_H_
#define KVSERVICE_CLIENT_OPTIONS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace kvservice::client {

// Every call has one, with its retries and the pauses between them.
struct Deadlines {
  std::chrono::milliseconds connect{5'000};
  // Attend and everything about one sequence.
  std::chrono::milliseconds data{2'000};
  // RegisterModel, and each stream of an AppendWriter.
  std::chrono::milliseconds admin{30'000};
};

// UNAVAILABLE alone is worth repeating without knowing more. The pause before attempt n + 1 is
// random between a half of and the whole of backoff_first * 2^(n - 1), at most backoff_max, and
// never less than what the server asked for.
struct RetryOptions {
  // 1 = never repeat.
  uint32_t attempts_max = 5;
  std::chrono::milliseconds backoff_first{20};
  std::chrono::milliseconds backoff_max{1'000};
};

struct ClientOptions {
  // "unix:/absolute/path" or "HOST:PORT".
  std::string endpoint = {};
  Deadlines deadlines = {};
  RetryOptions retry = {};
  // Largest message in either direction; the server has a limit of its own.
  size_t message_bytes_max = size_t{64} << 20;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_OPTIONS_H_
