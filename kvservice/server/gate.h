// The one gate of a side of the server: who a caller is, whether the call may run, what is written
// about it. Thread-safe.

#ifndef KVSERVICE_KVSERVICE_SERVER_GATE_H_
#define KVSERVICE_KVSERVICE_SERVER_GATE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "kvservice/clock.h"
#include "kvservice/server/access.h"
#include "kvservice/server/call.h"
#include "kvservice/server/call_metrics.h"

namespace spdlog {
class logger;  // NOLINT(readability-identifier-naming)
}  // namespace spdlog

namespace kvservice {

class AccessLog;

inline constexpr uint32_t kSlowCallsLoggedPerSecond = 10;

// The map in force, which operators may replace at any time.
class Identities {
 public:
  explicit Identities(IdentityMap map) { Set(std::move(map)); }
  void Set(IdentityMap map) {
    auto next = std::make_shared<const IdentityMap>(std::move(map));
    const std::lock_guard<std::mutex> lock(mutex_);
    map_ = std::move(next);
  }
  // Shared, because a call may still look into a map that was replaced.
  std::shared_ptr<const IdentityMap> Get() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return map_;
  }

 private:
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::shared_ptr<const IdentityMap> map_;
};

// Lets so many through in any second that begins with the first of them.
class RateLimit {
 public:
  explicit RateLimit(uint64_t per_second) : per_second_(per_second) {}
  bool Admit(uint64_t now_ns);

 private:
  const uint64_t per_second_;
  std::mutex mutex_;
  // Guarded by mutex_.
  uint64_t second_began_ns_ = 0;
  uint64_t count_ = 0;
};

class Gate final : public CallGate {
 public:
  // Pointers are borrowed.
  struct Options {
    // "data" or "admin", for the access log.
    const char* side = nullptr;
    // Roles of which every caller of this side needs one, besides what the method asks for; none =
    // the method decides.
    RoleSet needed;
    const Identities* identities = nullptr;
    Clock* clock = nullptr;
    // nullptr = nothing is written.
    spdlog::logger* logger = nullptr;
    AccessLog* access_log = nullptr;
    // Attends that take longer are logged, some of any second; 0 = none.
    uint32_t slow_call_ms = 0;
  };
  explicit Gate(const Options& options) : options_(options), slow_call_ms_(options.slow_call_ms) {}

  // From now on every call is turned away.
  void Close() { closed_ = true; }
  bool closed() const { return closed_; }

  Caller Identify(const grpc::ServerContext& context) override;
  absl::Status Allow(const MethodAccess& method, const Caller& caller) override;
  absl::Status Admit(const MethodAccess& method, const Caller& caller) override;
  void Ended(const CallRecord& record) override;
  void Attended(const AttendTimes& times) override;

  const CallMetrics& metrics() const { return metrics_; }
  void set_slow_call_ms(uint32_t slow_call_ms) { slow_call_ms_ = slow_call_ms; }

 private:
  const Options options_;
  CallMetrics metrics_;
  RateLimit slow_calls_{kSlowCallsLoggedPerSecond};
  std::atomic<uint32_t> slow_call_ms_;
  std::atomic<bool> closed_{false};
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_GATE_H_
