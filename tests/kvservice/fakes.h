// The seams of the engine under a test's control.

#ifndef KVSERVICE_TESTS_KVSERVICE_FAKES_H_
#define KVSERVICE_TESTS_KVSERVICE_FAKES_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "attention/device.h"
#include "kvservice/clock.h"
#include "kvservice/random.h"

namespace kvservice::testing {

// A clock that stands still until it is moved. Thread-safe.
class FakeClock : public Clock {
 public:
  uint64_t SteadyNowNs() const override { return now_ns_; }
  uint64_t WallNowNs() const override { return 1'700'000'000'000'000'000 + now_ns_; }
  void AdvanceMs(uint64_t ms) { now_ns_ += ms * 1'000'000; }

 private:
  std::atomic<uint64_t> now_ns_ = 1'000'000'000;
};

// Bytes that follow from a seed. Thread-safe.
class SeededRandom : public Random {
 public:
  explicit SeededRandom(uint64_t seed) : engine_(seed) {}
  absl::Status Fill(absl::Span<std::byte> bytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fails_) return absl::UnavailableError("no randomness");
    for (std::byte& byte : bytes)
      byte = constant_ ? std::byte{7} : static_cast<std::byte>(engine_());
    return absl::OkStatus();
  }
  void set_fails(bool fails) { fails_ = fails; }
  // Every call gives the same bytes.
  void set_constant(bool constant) { constant_ = constant; }

 private:
  std::atomic<bool> fails_ = false;
  std::atomic<bool> constant_ = false;
  std::mutex mutex_;
  std::mt19937_64 engine_;
};

// Forwards every call to the device inside.
class DeviceWrapper : public Device {
 public:
  explicit DeviceWrapper(std::unique_ptr<Device> inner) : inner_(std::move(inner)) {}
  std::string_view name() const override { return inner_->name(); }
  absl::StatusOr<DeviceMemory> Allocate(size_t bytes) override { return inner_->Allocate(bytes); }
  std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& layout, uint32_t anchors_max) override {
    return inner_->NewTokenLists(layout, anchors_max);
  }
  void Copy(absl::Span<const MemoryCopy> copies) override { inner_->Copy(copies); }
  void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override {
    inner_->Append(layout, slices);
  }
  void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) override {
    inner_->Seal(layout, slices);
  }
  void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) override {
    inner_->Attend(shape, rows);
  }
  void ParallelFor(uint32_t count, absl::FunctionRef<void(uint32_t)> task) override {
    inner_->ParallelFor(count, task);
  }

 private:
  std::unique_ptr<Device> inner_;
};

// Calls back before each batch, and after it, on the thread that runs it.
class WatchedDevice : public DeviceWrapper {
 public:
  using Watcher = std::function<void(const LayerShape& shape, absl::Span<AttendRow> rows)>;
  explicit WatchedDevice(std::unique_ptr<Device> inner) : DeviceWrapper(std::move(inner)) {}
  void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) override {
    if (before_) before_(shape, rows);
    DeviceWrapper::Attend(shape, rows);
    if (after_) after_(shape, rows);
  }
  // While no call is under way.
  void set_before(Watcher before) { before_ = std::move(before); }
  void set_after(Watcher after) { after_ = std::move(after); }

 private:
  Watcher before_;
  Watcher after_;
};

// A device that two calls may be on, as on a GPU; each is answered when it is finished, and not
// done before somebody says so. Thread-safe where it says what happened.
class LateDevice : public DeviceWrapper {
 public:
  explicit LateDevice(std::unique_ptr<Device> inner) : DeviceWrapper(std::move(inner)) {}
  uint32_t calls_max() const override { return 2; }
  void Begin(const LayerShape& shape, absl::Span<AttendRow> rows) override {
    begun_.emplace_back(&shape, rows);
    most_beside_ = std::max<size_t>(most_beside_, begun_.size());
    ++begun_count_;
  }
  void Finish() override {
    const auto [shape, rows] = begun_.front();
    begun_.pop_front();
    DeviceWrapper::Attend(*shape, rows);
  }
  bool IsDone() override { return !works_; }

  void set_works(bool works) { works_ = works; }
  int begun_count() const { return begun_count_; }
  // Calls that were on it at a time.
  size_t most_beside() const { return most_beside_; }

 private:
  std::deque<std::pair<const LayerShape*, absl::Span<AttendRow>>> begun_;
  std::atomic<bool> works_{false};
  std::atomic<int> begun_count_{0};
  std::atomic<size_t> most_beside_{0};
};

// Holds whoever runs a device in the middle of a call until it is let go; thread-safe. Outlives the
// devices made with it.
class Brake {
 public:
  std::unique_ptr<Device> On(std::unique_ptr<Device> inner) {
    auto watched = std::make_unique<WatchedDevice>(std::move(inner));
    watched->set_before([this](const LayerShape&, absl::Span<AttendRow>) {
      ++call_count_;
      while (is_set_) std::this_thread::yield();
    });
    return watched;
  }
  void Set(bool is_set) { is_set_ = is_set; }
  // Calls that have begun.
  int call_count() const { return call_count_; }

 private:
  std::atomic<bool> is_set_{false};
  std::atomic<int> call_count_{0};
};

// Polls an observation of another thread's progress, for at most half a minute.
template <typename Condition>
bool Eventually(Condition condition) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (std::chrono::steady_clock::now() < give_up) {
    if (condition()) return true;
    std::this_thread::yield();
  }
  return false;
}

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_KVSERVICE_FAKES_H_
