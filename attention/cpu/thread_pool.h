// A fixed set of threads that share the tasks of one call. A call of a few microseconds must not
// pay for waking a thread, so workers spin for a moment after their last task before they block:
// for as long as they are told, or for a time that adapts to how soon work has been arriving.
//
// One thread at a time may call ParallelFor (the device's caller); the pool is no queue.

#ifndef KVSERVICE_ATTENTION_CPU_THREAD_POOL_H_
#define KVSERVICE_ATTENTION_CPU_THREAD_POOL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvservice {

class ThreadPool {
 public:
  // task: index in [0, task_count). thread: index in [0, thread_count()), for scratch memory.
  using Task = absl::FunctionRef<void(uint32_t task, uint32_t thread)>;

  // thread_count includes the calling thread and is at least 1. spin_us: time for which a worker
  // spins; 0 = it adapts.
  explicit ThreadPool(uint32_t thread_count, uint32_t spin_us = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  uint32_t thread_count() const { return static_cast<uint32_t>(workers_.size()) + 1; }

  // Runs every task once, on any of the threads (the caller's is index 0), and returns when all are
  // done. What tasks wrote is visible to the caller. No more threads take part than have
  // `tasks_per_thread` each: for tasks so short that waking a thread costs as much as several of
  // them.
  //
  // Of n threads each takes every n-th task, and then what others have left. So the largest should
  // come first, and a thread that takes part each time finds in its caches what the same task of
  // the call before has left there.
  void ParallelFor(uint32_t task_count, Task task, uint32_t tasks_per_thread = 1);
  // The same, while the caller's thread runs `own` before it takes tasks.
  void ParallelForBeside(absl::FunctionRef<void()> own, uint32_t task_count, Task task,
                         uint32_t tasks_per_thread = 1);

 private:
  struct Job {
    const uint32_t task_count;
    const Task run;
    const uint32_t stripe_count;
  };
  // How many tasks of a stripe have been taken, or more.
  struct alignas(64) Stripe {
    std::atomic<uint32_t> taken{0};
  };
  // Number of the latest job, and how many workers may still enter it.
  struct Entry {
    uint32_t generation;
    uint32_t room;
  };
  static Entry EntryOf(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(bits)};
  }
  static uint64_t BitsOf(Entry entry) { return uint64_t{entry.generation} << 32 | entry.room; }

  void Run(absl::FunctionRef<void()> own, uint32_t task_count, Task task, uint32_t threads);
  void RunTasks(const Job& job, uint32_t thread);
  void WorkerLoop(uint32_t thread);
  // Spins. True when there is a job after `seen` or the pool closes.
  bool SpinForJob(uint32_t seen, uint32_t* spin_limit) const;
  // Spins, then blocks, until there is a job after `seen` or the pool closes. Returns false when it
  // closes.
  bool WaitForJob(uint32_t seen, uint32_t* spin_limit);
  // False if the latest job, whose number `seen` becomes, has ended or has all the workers that it
  // may have. Those that entered leave.
  bool Enter(uint32_t* seen);
  void Leave();
  void WaitUntilLeft(uint32_t entered);

  const std::chrono::microseconds spin_;
  std::vector<std::thread> workers_;

  // A worker enters by taking room and leaves by being counted, without a lock: meeting at one is
  // what short jobs would pay for. Whoever closes a job's room waits for those that took some, so
  // job_ is read only between entering and leaving.
  std::atomic<uint64_t> entry_{0};
  std::atomic<uint32_t> left_count_{0};
  const Job* job_ = nullptr;
  std::vector<Stripe> stripes_;  // as many as threads
  // Of sequential consistency with entry_ and left_count_: who publishes sees that somebody sleeps,
  // or the sleeper sees what was published.
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_THREAD_POOL_H_
