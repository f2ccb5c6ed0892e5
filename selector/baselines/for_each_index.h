// A loop whose iterations do not depend on each other, over several threads.

#ifndef KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_
#define KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kvservice::baselines {

// Calls body(i) for every i < count, on `threads` threads, the calling one included; returns when
// all are done. body may be called from all of them at once.
template <typename Body>
void ForEachIndex(uint32_t count, uint32_t threads, const Body& body) {
  std::atomic<uint32_t> next = 0;
  const auto work = [&] {
    for (uint32_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::thread> others;
  for (uint32_t t = 1; t < threads && t < count; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_
