// Who did what to the server and who was turned away: one line of JSON per call of the admin side
// and per call that was refused for want of identity or role. Never holds tensors, messages or
// keys.
//
//     {"time":"2026-03-01T12:00:00.123Z","side":"admin","method":"AdminService.Evict",
//      "identity":"spiffe://example.org/operator","tenant":"ops","peer":"ipv4:10.0.0.7:40312",
//      "subject":"00112233445566778899aabbccddeeff","code":"OK","reason":"","duration_us":412}
//
// Refusals can be provoked by strangers: at most kRefusalsPerSecondMax lines a second are written
// about them; a later line says how many were left out ("suppressed"). Thread-safe.

#ifndef KVSERVICE_KVSERVICE_SERVER_ACCESS_LOG_H_
#define KVSERVICE_KVSERVICE_SERVER_ACCESS_LOG_H_

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "kvservice/clock.h"
#include "kvservice/server/call.h"

namespace kvservice {

class AccessLog {
 public:
  static constexpr uint32_t kRefusalsPerSecondMax = 100;
  // Takes a line without its end. Called by one thread at a time.
  using Sink = std::function<void(const std::string& line)>;

  // `clock` is borrowed.
  AccessLog(Clock* clock, Sink sink) : clock_(clock), sink_(std::move(sink)) {}

  // Writes a line if the call is one to write about. `side` is "data" or "admin".
  void Ended(const char* side, const CallRecord& record);

 private:
  // Needs mutex_. False when too many were written in this second.
  bool MayWriteRefusal();

  Clock* const clock_;
  const Sink sink_;
  std::mutex mutex_;
  // Guarded by mutex_.
  uint64_t second_ = 0;
  uint32_t refusals_in_second_ = 0;
  uint64_t suppressed_ = 0;
};

// Appends lines to a file that only its owner may read. At `bytes_max` it becomes PATH.1, that one
// PATH.2 and so on, and the fourth goes. UNAVAILABLE when it cannot be opened; lines that cannot be
// written later are told of on stderr.
absl::StatusOr<AccessLog::Sink> NewAccessLogFile(const std::string& path, size_t bytes_max);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ACCESS_LOG_H_
