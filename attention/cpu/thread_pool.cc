#include "attention/cpu/thread_pool.h"

#include <algorithm>
#include <cassert>

#include "hwy/cache_control.h"

namespace kvservice {
namespace {

// One spin costs 10 to 40 ns. The longest spin (about 50 us) covers the time between the layers of
// a small model; the shortest covers the serial parts within a call, and is all that an idle server
// pays per call.
constexpr uint32_t kSpinMin = 256;
constexpr uint32_t kSpinMax = 2048;

}  // namespace

ThreadPool::ThreadPool(uint32_t thread_count, uint32_t spin_us) : spin_(spin_us) {
  assert(thread_count >= 1);
  workers_.reserve(thread_count - 1);
  for (uint32_t thread = 1; thread < thread_count; ++thread) {
    workers_.emplace_back([this, thread] { WorkerLoop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_.store(true, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunTasks(Job* job, uint32_t thread) {
  for (;;) {
    const uint32_t task = job->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job->task_count) return;
    job->run(task, thread);
  }
}

void ThreadPool::ParallelFor(uint32_t task_count, Task task, uint32_t tasks_per_thread) {
  if (task_count == 0) return;
  const uint32_t threads = (task_count + tasks_per_thread - 1) / tasks_per_thread;
  Job job(task_count, task, std::min(threads - 1, static_cast<uint32_t>(workers_.size())));
  if (job.room == 0) {
    RunTasks(&job, 0);
    return;
  }
  uint32_t woken = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    generation_.fetch_add(1, std::memory_order_release);
    woken = std::min(job.room, sleeping_);
  }
  for (; woken > 0; --woken) wake_.notify_one();
  RunTasks(&job, 0);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = nullptr;  // From here on no worker enters; those inside finish their last task.
  }
  for (uint32_t spin = 0; spin < kSpinMax; ++spin) {
    if (inside_.load(std::memory_order_acquire) == 0) return;
    hwy::Pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  left_.wait(lock, [this] { return inside_.load(std::memory_order_acquire) == 0; });
}

ThreadPool::Job* ThreadPool::EnterJob(uint64_t* seen) {
  const std::lock_guard<std::mutex> lock(mutex_);
  *seen = generation_.load(std::memory_order_relaxed);
  if (job_ == nullptr || job_->room == 0) return nullptr;
  --job_->room;
  inside_.fetch_add(1, std::memory_order_relaxed);
  return job_;
}

void ThreadPool::LeaveJob() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (inside_.fetch_sub(1, std::memory_order_release) == 1) left_.notify_one();
}

bool ThreadPool::SpinForJob(uint64_t seen, uint32_t* spin_limit) const {
  const auto ready = [this, seen] {
    return closing_.load(std::memory_order_acquire) ||
           generation_.load(std::memory_order_acquire) != seen;
  };
  if (spin_.count() > 0) {
    const auto end = std::chrono::steady_clock::now() + spin_;
    do {
      for (uint32_t spin = 0; spin < kSpinMin; ++spin) {
        if (ready()) return true;
        hwy::Pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }
  for (uint32_t spin = 0; spin < *spin_limit; ++spin) {
    if (ready()) {
      *spin_limit = std::min(2 * *spin_limit, kSpinMax);
      return true;
    }
    hwy::Pause();
  }
  *spin_limit = std::max(*spin_limit / 2, kSpinMin);
  return false;
}

bool ThreadPool::WaitForJob(uint64_t seen, uint32_t* spin_limit) {
  if (SpinForJob(seen, spin_limit)) return !closing_.load(std::memory_order_acquire);
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_;
  wake_.wait(lock, [this, seen] {
    return closing_.load(std::memory_order_relaxed) ||
           generation_.load(std::memory_order_relaxed) != seen;
  });
  --sleeping_;
  return !closing_.load(std::memory_order_relaxed);
}

void ThreadPool::WorkerLoop(uint32_t thread) {
  uint64_t seen = 0;
  uint32_t spin_limit = kSpinMin;
  while (WaitForJob(seen, &spin_limit)) {
    Job* job = EnterJob(&seen);
    if (job == nullptr) continue;
    RunTasks(job, thread);
    LeaveJob();
  }
}

}  // namespace kvservice
