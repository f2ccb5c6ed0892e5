#include "attention/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace kvservice {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const uint32_t threads : {1U, 2U, 5U}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.thread_count(), threads);
    // From none to many more than threads, again and again: late workers of one call meet the next.
    for (uint32_t round = 0; round < 2000; ++round) {
      const uint32_t count = round % 17;
      // Plain numbers: the pool alone orders these writes before the reads below.
      std::vector<uint32_t> runs(count, 0);
      pool.ParallelFor(count, [&](uint32_t task, uint32_t thread) {
        EXPECT_LT(thread, threads);
        ++runs[task];
      });
      EXPECT_EQ(runs, std::vector<uint32_t>(count, 1));
    }
  }
}

TEST(ThreadPool, ThreadIndicesAreExclusive) {
  constexpr uint32_t kThreads = 4;
  ThreadPool pool(kThreads);
  std::vector<std::atomic<bool>> busy(kThreads);
  std::atomic<uint32_t> clashes{0};
  pool.ParallelFor(20000, [&](uint32_t, uint32_t thread) {
    if (busy[thread].exchange(true)) ++clashes;
    busy[thread].store(false);
  });
  EXPECT_EQ(clashes.load(), 0U);
}

TEST(ThreadPool, TheCallersOwnPartIsTheCallers) {
  for (const uint32_t threads : {1U, 4U}) {
    ThreadPool pool(threads, /*spin_us=*/1000);
    for (uint32_t count = 0; count < 2000; ++count) {
      std::thread::id own;
      std::atomic<uint32_t> tasks{0};
      pool.ParallelForBeside([&] { own = std::this_thread::get_id(); }, count % 9,
                             [&](uint32_t, uint32_t) { ++tasks; });
      ASSERT_EQ(own, std::this_thread::get_id());
      ASSERT_EQ(tasks, count % 9);
    }
  }
}

// A thread that is slow, or does not come, holds nobody up.
TEST(ThreadPool, OthersTakeWhatAThreadLeaves) {
  constexpr uint32_t kThreads = 4;
  constexpr uint32_t kTasks = 64;
  ThreadPool pool(kThreads);
  std::barrier begin(kThreads);
  std::atomic<uint32_t> ended{0};
  pool.ParallelFor(kTasks, [&](uint32_t task, uint32_t) {
    // Each thread has one.
    if (task < kThreads) begin.arrive_and_wait();
    // The first waits until all others have run, the rest of its stripe among them.
    while (task == 0 && ended < kTasks - 1) std::this_thread::yield();
    ++ended;
  });
  EXPECT_EQ(ended, kTasks);
}

// Every task waits for all: a call really runs on all threads at once.
TEST(ThreadPool, TasksRunAtTheSameTime) {
  constexpr uint32_t kThreads = 3;
  ThreadPool pool(kThreads);
  std::atomic<uint32_t> here{0};
  pool.ParallelFor(kThreads, [&](uint32_t, uint32_t) {
    ++here;
    while (here.load() < kThreads) std::this_thread::yield();
  });
  EXPECT_EQ(here.load(), kThreads);
}

// Six tasks of which two threads are worth it: the two meet, no third one is ever there.
TEST(ThreadPool, ShortTasksTakeFewThreads) {
  ThreadPool pool(8);
  for (int round = 0; round < 50; ++round) {
    std::mutex mutex;
    std::set<uint32_t> threads;
    const auto note = [&](uint32_t /*task*/, uint32_t thread) {
      const std::lock_guard<std::mutex> lock(mutex);
      threads.insert(thread);
    };
    pool.ParallelFor(6, note, 3);
    EXPECT_LE(threads.size(), 2U);
    threads.clear();
    pool.ParallelFor(6, note, 6);
    EXPECT_EQ(threads, std::set<uint32_t>{0});
  }
  std::barrier meeting(2);
  pool.ParallelFor(
      2, [&](uint32_t, uint32_t) { meeting.arrive_and_wait(); }, 1);
}

TEST(ThreadPool, StartsAndStopsIdle) {
  for (int i = 0; i < 50; ++i) const ThreadPool pool(3);
  for (int i = 0; i < 50; ++i) const ThreadPool pool(3, 1000);
}

}  // namespace
}  // namespace kvservice
