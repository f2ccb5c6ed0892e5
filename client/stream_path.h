// Attend calls by streams that stay open, each for one call at a time. Inside the library only.

#ifndef KVSERVICE_CLIENT_STREAM_PATH_H_
#define KVSERVICE_CLIENT_STREAM_PATH_H_

#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "client/rpc.h"

namespace kvservice::client {

// Any thread.
class StreamPath {
 public:
  // Calls under way at a time; more take another way.
  static constexpr size_t kStreamsMax = 8;

  // Borrows `rpc`.
  explicit StreamPath(Rpc* rpc) : rpc_(rpc) {}

  // The answer; nothing if the call must take another way, which is safe: all streams are busy, the
  // server knows none, is going down or is gone.
  std::optional<absl::Status> Attend(const PayloadMessage& request,
                                     std::chrono::steady_clock::time_point deadline,
                                     v1::AttendResponse* response);
  // False once the server has said that it knows none.
  bool is_served() const;

 private:
  std::unique_ptr<AttendStream> Take();
  void Return(std::unique_ptr<AttendStream> stream);

  Rpc* const rpc_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<std::unique_ptr<AttendStream>> idle_;
  size_t taken_count_ = 0;
  bool is_served_ = true;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_STREAM_PATH_H_
