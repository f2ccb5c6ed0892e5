// Who is healthy: what grpc.health.v1.Health is asked for. Served on the completion queues like
// everything else, as gRPC's own health service would bring its callback API and with it threads
// that poll every connection beside the queue's own: they cost each call one or two wake-ups.
//
// Thread-safe.

#ifndef KVSERVICE_KVSERVICE_SERVER_HEALTH_H_
#define KVSERVICE_KVSERVICE_SERVER_HEALTH_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace kvservice {

inline constexpr char kHealthCheckMethod[] = "/grpc.health.v1.Health/Check";
inline constexpr char kHealthWatchMethod[] = "/grpc.health.v1.Health/Watch";

// grpc.health.v1.HealthCheckResponse.ServingStatus.
enum class HealthStatus : int32_t { kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

class HealthBoard {
 public:
  void Set(const std::string& service, bool serving);
  // kServiceUnknown for a service that was never set.
  HealthStatus Get(const std::string& service) const;

  // Called at once with the present status and after every Set of the service, on the thread of
  // either and under the board's lock, so that the last it hears is how it is: must be quick and
  // must not come back here.
  using Changed = std::function<void(HealthStatus status)>;
  // Returns the watcher's number.
  uint64_t Watch(const std::string& service, Changed changed);
  // `changed` is not called any more once this returns.
  void Unwatch(uint64_t number);

 private:
  HealthStatus Find(const std::string& service) const;

  struct Watcher {
    std::string service;
    Changed changed;
  };

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::string, bool> serving_;
  std::map<uint64_t, Watcher> watchers_;
  uint64_t last_number_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_HEALTH_H_
