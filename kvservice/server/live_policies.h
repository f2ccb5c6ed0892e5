// The named policies of a server, which can be replaced while calls use them. Policies that were
// replaced stay in memory, as calls may still point to them; that is why there is an end to it.
// Thread-safe.

#ifndef KVSERVICE_KVSERVICE_SERVER_LIVE_POLICIES_H_
#define KVSERVICE_KVSERVICE_SERVER_LIVE_POLICIES_H_

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kvservice/server/policy_registry.h"

namespace kvservice {

class LivePolicies {
 public:
  static constexpr size_t kReplacementsMax = 256;

  explicit LivePolicies(PolicyRegistry policies) { Add(std::move(policies)); }
  LivePolicies(const LivePolicies&) = delete;
  LivePolicies& operator=(const LivePolicies&) = delete;

  // Lives as long as this object.
  const PolicyRegistry& now() const { return *now_.load(std::memory_order_acquire); }
  // RESOURCE_EXHAUSTED, and nothing changed, after kReplacementsMax of them.
  absl::Status Replace(PolicyRegistry policies) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (all_.size() > kReplacementsMax) {
      return absl::ResourceExhaustedError(
          "the policies were replaced as often as they may be; a restart reads them again");
    }
    Add(std::move(policies));
    return absl::OkStatus();
  }

 private:
  void Add(PolicyRegistry policies) {
    all_.push_back(std::make_unique<const PolicyRegistry>(std::move(policies)));
    now_.store(all_.back().get(), std::memory_order_release);
  }

  std::atomic<const PolicyRegistry*> now_{nullptr};
  std::mutex mutex_;
  // Guarded by mutex_ after construction: the latest one last.
  std::vector<std::unique_ptr<const PolicyRegistry>> all_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_LIVE_POLICIES_H_
