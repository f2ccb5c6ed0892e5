// Looking for more work for a while before sleeping. Waking a thread costs tens of microseconds, on
// a virtual machine more, as much as a layer's attention; a decode loop calls again within that
// time.

#ifndef KVSERVICE_KVSERVICE_SPIN_H_
#define KVSERVICE_KVSERVICE_SPIN_H_

#include <cstdint>
#include <thread>

#include "kvservice/clock.h"

namespace kvservice {

// One thread's. Closed until the thread has worked, so that an idle service sleeps.
class SpinWindow {
 public:
  // clock is borrowed and may be null when spin_us is 0, which never opens.
  SpinWindow(Clock* clock, uint32_t spin_us) : clock_(clock), spin_ns_(uint64_t{spin_us} * 1000) {}

  // The thread has worked: the window opens.
  void Open() {
    if (spin_ns_ > 0) end_ns_ = clock_->SteadyNowNs() + spin_ns_;
  }
  // True while it is worth looking again. Lets other threads run in between.
  bool Wait() {
    if (end_ns_ == 0) return false;
    if (clock_->SteadyNowNs() >= end_ns_) {
      end_ns_ = 0;
      return false;
    }
    std::this_thread::yield();
    return true;
  }

 private:
  Clock* const clock_;
  const uint64_t spin_ns_;
  uint64_t end_ns_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SPIN_H_
