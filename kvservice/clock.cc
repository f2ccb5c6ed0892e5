#include "kvservice/clock.h"

#include <chrono>

namespace kvservice {
namespace {

template <typename Timepoint>
uint64_t Nanoseconds(Timepoint point) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(point.time_since_epoch()).count());
}

class StandardClock : public Clock {
 public:
  uint64_t SteadyNowNs() const override { return Nanoseconds(std::chrono::steady_clock::now()); }
  uint64_t WallNowNs() const override { return Nanoseconds(std::chrono::system_clock::now()); }
};

}  // namespace

// Stateless, so one object serves everybody.
Clock* SystemClock() {
  static StandardClock clock;
  return &clock;
}

}  // namespace kvservice
