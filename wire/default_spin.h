// How long threads that have just been busy look for more before they sleep, where nobody says.

#ifndef KVSERVICE_WIRE_DEFAULT_SPIN_H_
#define KVSERVICE_WIRE_DEFAULT_SPIN_H_

#include <cstdint>
#include <thread>

namespace kvservice::wire {

// Microseconds; only where the threads that spin leave enough CPUs to the others. Longer than a
// call on a large batch takes, and than a model computes between two calls: waking a thread costs
// 25 to 50.
inline uint32_t DefaultSpinUs() {
  constexpr uint32_t kCpusMin = 8;
  constexpr uint32_t kSpinUs = 2000;
  return std::thread::hardware_concurrency() < kCpusMin ? 0 : kSpinUs;
}

}  // namespace kvservice::wire

#endif  // KVSERVICE_WIRE_DEFAULT_SPIN_H_
