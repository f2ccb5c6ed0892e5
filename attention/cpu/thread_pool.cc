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

ThreadPool::ThreadPool(uint32_t thread_count, uint32_t spin_us)
    : spin_(spin_us), stripes_(thread_count) {
  assert(thread_count >= 1);
  workers_.reserve(thread_count - 1);
  for (uint32_t thread = 1; thread < thread_count; ++thread) {
    workers_.emplace_back([this, thread] { WorkerLoop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunTasks(const Job& job, uint32_t thread) {
  const auto take = [&job](Stripe* stripe, uint32_t index) {
    // Looked at first: at the end everybody comes by.
    uint64_t taken = stripe->taken.load(std::memory_order_relaxed);
    if (index + taken * job.stripe_count >= job.task_count) return job.task_count;
    taken = stripe->taken.fetch_add(1, std::memory_order_relaxed);
    return static_cast<uint32_t>(
        std::min<uint64_t>(index + taken * job.stripe_count, job.task_count));
  };
  for (uint32_t i = 0; i < job.stripe_count; ++i) {
    const uint32_t index = (thread + i) % job.stripe_count;
    for (;;) {
      const uint32_t task = take(&stripes_[index], index);
      if (task == job.task_count) break;
      job.run(task, thread);
    }
  }
}

void ThreadPool::ParallelFor(uint32_t task_count, Task task, uint32_t tasks_per_thread) {
  const uint32_t threads = (task_count + tasks_per_thread - 1) / tasks_per_thread;
  Run([] {}, task_count, task, threads);
}

void ThreadPool::ParallelForBeside(absl::FunctionRef<void()> own, uint32_t task_count, Task task,
                                   uint32_t tasks_per_thread) {
  const uint32_t threads = (task_count + tasks_per_thread - 1) / tasks_per_thread;
  Run(own, task_count, task, threads + 1);
}

// `threads`: as many as are worth taking part.
void ThreadPool::Run(absl::FunctionRef<void()> own, uint32_t task_count, Task task,
                     uint32_t threads) {
  if (task_count == 0) return own();
  const uint32_t room = std::min(threads - 1, static_cast<uint32_t>(workers_.size()));
  const Job job{.task_count = task_count, .run = task, .stripe_count = room + 1};
  for (uint32_t i = 0; i < job.stripe_count; ++i) stripes_[i].taken = 0;
  if (room == 0) {
    own();
    return RunTasks(job, 0);
  }
  // Nobody is inside: all that entered the job before have left it.
  job_ = &job;
  left_count_ = 0;
  const uint32_t generation = EntryOf(entry_).generation + 1;
  entry_ = BitsOf({generation, room});
  if (sleeping_ > 0) {
    // A sleeper that has looked in vain waits by now.
    const std::lock_guard<std::mutex> lock(mutex_);
    for (uint32_t i = std::min<uint32_t>(room, sleeping_); i > 0; --i) wake_.notify_one();
  }
  own();
  RunTasks(job, 0);
  const Entry last = EntryOf(entry_.exchange(BitsOf({generation, 0})));
  WaitUntilLeft(room - last.room);
}

void ThreadPool::WaitUntilLeft(uint32_t entered) {
  for (uint32_t spin = 0; spin < kSpinMax; ++spin) {
    if (left_count_ == entered) return;
    hwy::Pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_ = true;
  left_.wait(lock, [this, entered] { return left_count_ == entered; });
  caller_sleeps_ = false;
}

bool ThreadPool::Enter(uint32_t* seen) {
  uint64_t bits = entry_;
  for (;;) {
    const Entry entry = EntryOf(bits);
    *seen = entry.generation;
    if (entry.room == 0) return false;
    if (entry_.compare_exchange_weak(bits, bits - 1)) return true;
  }
}

void ThreadPool::Leave() {
  ++left_count_;
  if (!caller_sleeps_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  left_.notify_one();
}

bool ThreadPool::SpinForJob(uint32_t seen, uint32_t* spin_limit) const {
  const auto ready = [this, seen] { return closing_ || EntryOf(entry_).generation != seen; };
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

bool ThreadPool::WaitForJob(uint32_t seen, uint32_t* spin_limit) {
  if (SpinForJob(seen, spin_limit)) return !closing_;
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_;
  wake_.wait(lock, [this, seen] { return closing_ || EntryOf(entry_).generation != seen; });
  --sleeping_;
  return !closing_;
}

void ThreadPool::WorkerLoop(uint32_t thread) {
  uint32_t seen = 0;
  uint32_t spin_limit = kSpinMin;
  while (WaitForJob(seen, &spin_limit)) {
    if (!Enter(&seen)) continue;
    RunTasks(*job_, thread);
    Leave();
  }
}

}  // namespace kvservice
