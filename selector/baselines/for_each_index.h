// A loop whose iterations do not depend on each other, over several threads.

#ifndef KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_
#define KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/types/span.h"

namespace kvservice::baselines {

// Calls body(i) for every i of `indices`, which differ, on `threads` threads, the calling one
// included; returns when all are done. body may be called from all of them at once.
template <typename Body>
void ForEachIndex(absl::Span<const uint32_t> indices, uint32_t threads, const Body& body) {
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < indices.size(); i = next++) body(indices[i]);
  };
  std::vector<std::thread> others;
  for (uint32_t t = 1; t < threads && t < indices.size(); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_FOR_EACH_INDEX_H_
