#include "kvservice/disk_worker.h"

#include <utility>

namespace kvservice {
namespace {

// What one commit takes together.
constexpr size_t kCommitBytesMax = size_t{64} << 20;

}  // namespace

DiskWorker::DiskWorker(DiskTier* tier, size_t file_bytes_wanted, Post post)
    : tier_(tier),
      file_bytes_wanted_(file_bytes_wanted),
      post_(std::move(post)),
      file_bytes_(tier->file_bytes()) {
  thread_ = std::thread([this] { Run(); });
}

DiskWorker::~DiskWorker() { Stop(); }

bool DiskWorker::HasRoom(size_t bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return jobs_.size() < kWaitingJobsMax && waiting_bytes_ + bytes <= kWaitingBytesMax;
}

size_t DiskWorker::waiting_jobs() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return jobs_.size() + jobs_running_;
}

void DiskWorker::Write(TierBatch batch, bool is_synced,
                       absl::AnyInvocable<void(absl::Status)> done) {
  Job job;
  job.bytes = batch.bytes();
  job.batch = std::move(batch);
  job.is_synced = is_synced;
  job.done = std::move(done);
  Push(std::move(job));
}

void DiskWorker::Read(absl::AnyInvocable<Answer(const DiskTier& tier)> read) {
  Job job;
  job.read = std::move(read);
  Push(std::move(job));
}

void DiskWorker::Push(Job job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_bytes_ += job.bytes;
    jobs_.push_back(std::move(job));
  }
  changed_.notify_one();
}

void DiskWorker::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void DiskWorker::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    std::vector<Job> taken;
    size_t bytes = 0;
    do {
      bytes += jobs_.front().bytes;
      taken.push_back(std::move(jobs_.front()));
      jobs_.pop_front();
    } while (taken.front().read == nullptr && !jobs_.empty() && jobs_.front().read == nullptr &&
             bytes + jobs_.front().bytes <= kCommitBytesMax);
    jobs_running_ = taken.size();
    lock.unlock();
    if (taken.front().read != nullptr) {
      post_(taken.front().read(*tier_));
    } else {
      RunWrites(&taken);
      CompactIfGrown(bytes);
    }
    lock.lock();
    jobs_running_ = 0;
    waiting_bytes_ -= bytes;
  }
}

void DiskWorker::RunWrites(std::vector<Job>* jobs) {
  std::vector<TierBatch> batches;
  bool is_synced = false;
  for (Job& job : *jobs) {
    batches.push_back(std::move(job.batch));
    is_synced = is_synced || job.is_synced;
  }
  const absl::Status status = tier_->Commit(batches, is_synced);
  if (!status.ok()) healthy_.store(false, std::memory_order_relaxed);
  for (Job& job : *jobs) {
    post_([status, done = std::move(job.done)]() mutable { done(status); });
  }
}

// Rows that were removed or written anew keep their room until files are compacted. A compaction
// costs about what is stored, so it follows as much writing.
void DiskWorker::CompactIfGrown(size_t written_bytes) {
  written_since_compaction_ += written_bytes;
  uint64_t bytes = tier_->file_bytes();
  const bool is_due = file_bytes_wanted_ > 0 && bytes > file_bytes_wanted_ &&
                      written_since_compaction_ >= file_bytes_wanted_ / 4;
  if (is_due && healthy()) {
    written_since_compaction_ = 0;
    if (!tier_->Compact().ok()) healthy_.store(false, std::memory_order_relaxed);
    bytes = tier_->file_bytes();
  }
  file_bytes_.store(bytes, std::memory_order_relaxed);
}

}  // namespace kvservice
