// The thread that waits for the disk, so that the executor never does.
//
// Jobs run in the order in which they came. Writes that wait together are committed together: one
// sync acknowledges all of them. What a job answers goes back to the executor through `post` and
// runs there.
//
// Threads: the executor calls; the worker's own thread alone uses the tier until Stop has returned.

#ifndef KVSERVICE_KVSERVICE_DISK_WORKER_H_
#define KVSERVICE_KVSERVICE_DISK_WORKER_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "kvservice/cache/disk_tier.h"

namespace kvservice {

class DiskWorker {
 public:
  using Answer = absl::AnyInvocable<void()>;
  using Post = std::function<void(Answer)>;
  // Jobs and their bytes that may wait; who asks HasRoom first stays below.
  static constexpr size_t kWaitingJobsMax = 1024;
  static constexpr size_t kWaitingBytesMax = size_t{256} << 20;

  // Files are compacted when they have outgrown `file_bytes_wanted`; 0 = never. Borrows the tier.
  DiskWorker(DiskTier* tier, size_t file_bytes_wanted, Post post);
  ~DiskWorker();
  DiskWorker(const DiskWorker&) = delete;
  DiskWorker& operator=(const DiskWorker&) = delete;

  bool HasRoom(size_t bytes) const;
  // `done` gets what Commit said. A batch that is not synced is when a later one is.
  void Write(TierBatch batch, bool is_synced, absl::AnyInvocable<void(absl::Status)> done);
  // `read` runs on the worker's thread; what it returns runs on the executor.
  void Read(absl::AnyInvocable<Answer(const DiskTier& tier)> read);

  // Jobs whose answers have not been posted yet.
  size_t waiting_jobs() const;
  // No write has failed yet.
  bool healthy() const { return healthy_.load(std::memory_order_relaxed); }
  uint64_t file_bytes() const { return file_bytes_.load(std::memory_order_relaxed); }

  // Finishes what waits; nothing may follow.
  void Stop();

 private:
  struct Job {
    TierBatch batch;
    size_t bytes = 0;
    bool is_synced = false;
    absl::AnyInvocable<void(absl::Status)> done;
    // Set: a read.
    absl::AnyInvocable<Answer(const DiskTier& tier)> read;
  };

  void Push(Job job);
  void Run();
  void RunWrites(std::vector<Job>* jobs);
  void CompactIfGrown(size_t written_bytes);

  DiskTier* const tier_;
  const size_t file_bytes_wanted_;
  const Post post_;

  // The worker's thread alone.
  size_t written_since_compaction_ = 0;

  std::atomic<bool> healthy_{true};
  std::atomic<uint64_t> file_bytes_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::deque<Job> jobs_;
  size_t jobs_running_ = 0;
  size_t waiting_bytes_ = 0;
  bool stopping_ = false;

  std::thread thread_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DISK_WORKER_H_
