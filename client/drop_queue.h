// Drops sequences in the background. Inside the library only.

#ifndef KVSERVICE_CLIENT_DROP_QUEUE_H_
#define KVSERVICE_CLIENT_DROP_QUEUE_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

#include "client/rpc.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice::client {

// One thread and a bounded queue. Any thread may push.
class DropQueue {
 public:
  // Beyond it sequences are left to their leases.
  static constexpr size_t kCapacity = 4096;

  // Borrows `rpc`. `deadline` is for each drop, and for all that are left at the end together.
  DropQueue(Rpc* rpc, std::chrono::milliseconds deadline);
  ~DropQueue();

  // Never blocks on the network, never fails.
  void Push(const std::string& id, uint64_t generation) noexcept;

 private:
  void Run();

  Rpc* const rpc_;
  const std::chrono::milliseconds deadline_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::deque<v1::SequenceHandle> handles_;
  bool stopping_ = false;
  std::chrono::steady_clock::time_point stop_at_;

  // Last: it uses everything above.
  std::thread thread_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_DROP_QUEUE_H_
