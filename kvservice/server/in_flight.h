// Calls between their arrival and their last event, and the bytes of the requests they hold. Bounds
// what requests may occupy and tells a drain when nothing is left. Thread-safe.

#ifndef KVSERVICE_KVSERVICE_SERVER_IN_FLIGHT_H_
#define KVSERVICE_KVSERVICE_SERVER_IN_FLIGHT_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>

namespace kvservice {

class InFlight {
 public:
  explicit InFlight(size_t bytes_max) : bytes_max_(bytes_max) {}

  void Enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++call_count_;
  }
  // Gives back `bytes` too.
  void Leave(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= bytes;
    if (--call_count_ == 0) empty_.notify_all();
  }

  // A stream that calls come by. Nobody waits for its next call, but for its end.
  void EnterStream() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++stream_count_;
  }
  void LeaveStream() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--stream_count_ == 0) empty_.notify_all();
  }

  // Takes `bytes`, or nothing (false) when the limit does not allow it.
  bool Reserve(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes > bytes_max_ - bytes_) return false;
    bytes_ += bytes;
    return true;
  }
  void Release(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= bytes;
  }

  // Calls, streams left out, with the bytes they have reserved.
  struct Load {
    size_t calls = 0;
    size_t bytes = 0;
    size_t bytes_max = 0;
  };
  Load load() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {.calls = call_count_, .bytes = bytes_, .bytes_max = bytes_max_};
  }

  // True when no call is left, false when the time is over first.
  bool WaitUntilEmpty(std::chrono::milliseconds time_max) {
    std::unique_lock<std::mutex> lock(mutex_);
    return empty_.wait_for(lock, time_max, [this] { return call_count_ == 0; });
  }
  // Nor a stream.
  void WaitUntilEmpty() {
    std::unique_lock<std::mutex> lock(mutex_);
    empty_.wait(lock, [this] { return call_count_ == 0 && stream_count_ == 0; });
  }

 private:
  const size_t bytes_max_;
  mutable std::mutex mutex_;
  std::condition_variable empty_;
  size_t call_count_ = 0;
  size_t stream_count_ = 0;
  size_t bytes_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_IN_FLIGHT_H_
