#include "kvservice/disk_worker.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

// Rows in a map; commits wait while it is held.
class MapTier final : public DiskTier {
 public:
  const ClosedStore& closed() const override { return closed_; }
  absl::Status Commit(absl::Span<const TierBatch> batches, bool is_synced) override {
    std::unique_lock<std::mutex> lock(mutex_);
    ++entered_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !is_held_; });
    commits_.emplace_back(batches.size(), is_synced);
    if (fails_) return absl::UnavailableError("no disk");
    for (const TierBatch& batch : batches) {
      for (const auto& [key, value] : batch.puts) rows_[key] = value;
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Read(const std::string& key) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = rows_.find(key);
    if (found == rows_.end()) return absl::DataLossError(key);
    return found->second;
  }
  absl::Status Scan(const std::string&,
                    absl::FunctionRef<void(absl::string_view, absl::string_view)>) const override {
    return absl::OkStatus();
  }
  uint64_t file_bytes() const override { return file_bytes_; }
  absl::Status Compact() override {
    ++compactions_;
    return absl::OkStatus();
  }
  absl::Status Close(const std::string&) override { return absl::OkStatus(); }

  void Hold() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_held_ = true;
  }
  void AwaitCommit(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return entered_ >= count; });
  }
  void Release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_held_ = false;
    changed_.notify_all();
  }
  void set_fails() { fails_ = true; }
  void set_file_bytes(uint64_t bytes) { file_bytes_ = bytes; }
  int compactions() const { return compactions_; }
  // Batches and whether they were synced; after Stop.
  const std::vector<std::pair<size_t, bool>>& commits() const { return commits_; }

 private:
  const ClosedStore closed_{};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> rows_;
  std::vector<std::pair<size_t, bool>> commits_;
  uint64_t file_bytes_ = 0;
  int compactions_ = 0;
  int entered_ = 0;
  bool is_held_ = false;
  bool fails_ = false;
};

TierBatch Put(const std::string& key, std::string value) {
  TierBatch batch;
  batch.puts.emplace_back(key, std::move(value));
  return batch;
}

class DiskWorkerTest : public ::testing::Test {
 protected:
  // Answers run in the thread of the worker; the lines that they wrote.
  DiskWorker::Post Post() {
    return [this](DiskWorker::Answer answer) {
      const std::lock_guard<std::mutex> lock(mutex_);
      answer();
    };
  }
  absl::AnyInvocable<void(absl::Status)> Tell(const std::string& name) {
    return [this, name](const absl::Status& status) {
      lines_.push_back(name + (status.ok() ? "" : " failed"));
    };
  }

  MapTier tier_;
  std::mutex mutex_;
  std::vector<std::string> lines_;
};

TEST_F(DiskWorkerTest, WritesThatWaitTogetherShareASync) {
  tier_.Hold();
  DiskWorker worker(&tier_, 0, Post());
  worker.Write(Put("a", "1"), false, Tell("a"));
  tier_.AwaitCommit(1);
  worker.Write(Put("b", "2"), false, Tell("b"));
  worker.Write(Put("b", "3"), true, Tell("c"));
  worker.Read([this](const DiskTier& tier) -> DiskWorker::Answer {
    return [this, value = *tier.Read("b")] { lines_.push_back("read " + value); };
  });
  worker.Write(Put("b", "4"), false, Tell("d"));
  EXPECT_EQ(worker.waiting_jobs(), 5);
  tier_.Release();
  worker.Stop();
  EXPECT_EQ(lines_, (std::vector<std::string>{"a", "b", "c", "read 3", "d"}));
  EXPECT_EQ(tier_.commits(),
            (std::vector<std::pair<size_t, bool>>{{1, false}, {2, true}, {1, false}}));
  EXPECT_EQ(worker.waiting_jobs(), 0);
}

TEST_F(DiskWorkerTest, WhatWaitsIsBounded) {
  tier_.Hold();
  DiskWorker worker(&tier_, 0, Post());
  worker.Write(Put("a", std::string(1000, 'x')), false, Tell("a"));
  tier_.AwaitCommit(1);
  EXPECT_TRUE(worker.HasRoom(DiskWorker::kWaitingBytesMax - 1001));
  EXPECT_FALSE(worker.HasRoom(DiskWorker::kWaitingBytesMax - 1000));
  for (size_t i = 0; i < DiskWorker::kWaitingJobsMax; ++i) {
    EXPECT_TRUE(worker.HasRoom(0));
    worker.Write(Put(absl::StrCat(i), ""), false, Tell("more"));
  }
  EXPECT_FALSE(worker.HasRoom(0));
  tier_.Release();
  worker.Stop();
  EXPECT_EQ(lines_.size(), 1 + DiskWorker::kWaitingJobsMax);
  EXPECT_TRUE(worker.HasRoom(0));
}

TEST_F(DiskWorkerTest, AFailureIsToldToAllAndRemembered) {
  tier_.set_fails();
  DiskWorker worker(&tier_, 0, Post());
  EXPECT_TRUE(worker.healthy());
  worker.Write(Put("a", "1"), true, Tell("a"));
  worker.Write(Put("b", "1"), true, Tell("b"));
  worker.Stop();
  EXPECT_EQ(lines_, (std::vector<std::string>{"a failed", "b failed"}));
  EXPECT_FALSE(worker.healthy());
}

TEST_F(DiskWorkerTest, OutgrownFilesAreCompactedOnceInAWhile) {
  tier_.set_file_bytes(2000);
  DiskWorker worker(&tier_, 1000, Post());
  for (int i = 0; i < 10; ++i) worker.Write(Put("a", std::string(99, 'x')), false, Tell("a"));
  worker.Stop();
  // 1000 bytes were written, a compaction follows 250.
  EXPECT_GE(tier_.compactions(), 1);
  EXPECT_LE(tier_.compactions(), 4);
  EXPECT_EQ(worker.file_bytes(), 2000);
}

}  // namespace
}  // namespace kvservice
