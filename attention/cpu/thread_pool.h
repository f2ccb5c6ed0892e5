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
  // done. What tasks wrote is visible to the caller. Tasks are handed out in order, so the largest
  // should come first. No more threads take part than have `tasks_per_thread` each: for tasks so
  // short that waking a thread costs as much as several of them.
  void ParallelFor(uint32_t task_count, Task task, uint32_t tasks_per_thread = 1);

 private:
  // What the threads of one ParallelFor share. Workers enter and leave it under mutex_, so that a
  // late one never sees the next.
  struct Job {
    Job(uint32_t count, Task function, uint32_t workers)
        : task_count(count), run(function), room(workers) {}
    const uint32_t task_count;
    const Task run;
    uint32_t room;  // for workers; guarded by mutex_
    std::atomic<uint32_t> next{0};
  };

  static void RunTasks(Job* job, uint32_t thread);
  void WorkerLoop(uint32_t thread);
  // Spins. True when the generation differs from `seen` or the pool closes.
  bool SpinForJob(uint64_t seen, uint32_t* spin_limit) const;
  // Spins, then blocks, until the generation differs from `seen` or the pool closes. Returns false
  // when it closes.
  bool WaitForJob(uint64_t seen, uint32_t* spin_limit);
  // nullptr if the job has ended, or has as many threads as it may have.
  Job* EnterJob(uint64_t* seen);
  void LeaveJob();

  const std::chrono::microseconds spin_;
  std::vector<std::thread> workers_;
  // Counts ParallelFor calls; the number of workers inside the current job. Both change under
  // mutex_ and are read by spinning threads.
  std::atomic<uint64_t> generation_{0};
  std::atomic<uint32_t> inside_{0};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  Job* job_ = nullptr;     // guarded by mutex_
  uint32_t sleeping_ = 0;  // guarded by mutex_
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_THREAD_POOL_H_
