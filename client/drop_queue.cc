#include "client/drop_queue.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "client/requests.h"

namespace kvservice::client {

using std::chrono::steady_clock;

DropQueue::DropQueue(Rpc* rpc, std::chrono::milliseconds deadline)
    : rpc_(rpc), deadline_(deadline), thread_([this] { Run(); }) {}

DropQueue::~DropQueue() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    stop_at_ = steady_clock::now() + deadline_;
  }
  changed_.notify_one();
  thread_.join();
}

void DropQueue::Push(const std::string& id, uint64_t generation) noexcept {
  try {
    v1::SequenceHandle handle = MakeHandle(id, generation);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (handles_.size() < kCapacity) handles_.push_back(std::move(handle));
  } catch (const std::exception&) {
    // Out of memory: the sequence's lease ends it.
    return;
  }
  changed_.notify_one();
}

void DropQueue::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !handles_.empty(); });
    if (handles_.empty()) return;
    v1::DropRequest request;
    *request.mutable_handle() = std::move(handles_.front());
    handles_.pop_front();
    steady_clock::time_point end = steady_clock::now() + deadline_;
    if (stopping_) end = std::min(end, stop_at_);
    lock.unlock();
    // Whatever comes back: nobody waits for it, and the lease is the remedy.
    rpc_->DropOnce(request, end).IgnoreError();
    lock.lock();
    if (stopping_ && steady_clock::now() >= stop_at_) return;
  }
}

}  // namespace kvservice::client
