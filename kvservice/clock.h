// The clock seam. Leases and deadlines use the steady clock only, so jumps of the wall clock change
// nothing; tests use a clock they move.

#ifndef KVSERVICE_KVSERVICE_CLOCK_H_
#define KVSERVICE_KVSERVICE_CLOCK_H_

#include <cstdint>

namespace kvservice {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds since an arbitrary fixed point; never goes back.
  virtual uint64_t SteadyNowNs() const = 0;
  // Nanoseconds since 1970, for logs and reports only.
  virtual uint64_t WallNowNs() const = 0;
};

// The system's clocks.
Clock* SystemClock();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CLOCK_H_
