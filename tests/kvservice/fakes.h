// The seams of the engine under a test's control.

#ifndef KVSERVICE_TESTS_KVSERVICE_FAKES_H_
#define KVSERVICE_TESTS_KVSERVICE_FAKES_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
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

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_KVSERVICE_FAKES_H_
