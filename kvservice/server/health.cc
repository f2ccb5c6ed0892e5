#include "kvservice/server/health.h"

#include <utility>

namespace kvservice {

HealthStatus HealthBoard::Find(const std::string& service) const {
  const auto found = serving_.find(service);
  if (found == serving_.end()) return HealthStatus::kServiceUnknown;
  return found->second ? HealthStatus::kServing : HealthStatus::kNotServing;
}

void HealthBoard::Set(const std::string& service, bool serving) {
  const std::lock_guard<std::mutex> lock(mutex_);
  serving_[service] = serving;
  const HealthStatus status = Find(service);
  for (const auto& [number, watcher] : watchers_) {
    if (watcher.service == service) watcher.changed(status);
  }
}

HealthStatus HealthBoard::Get(const std::string& service) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return Find(service);
}

uint64_t HealthBoard::Watch(const std::string& service, Changed changed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  changed(Find(service));
  watchers_[++last_number_] = {.service = service, .changed = std::move(changed)};
  return last_number_;
}

void HealthBoard::Unwatch(uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  watchers_.erase(number);
}

}  // namespace kvservice
