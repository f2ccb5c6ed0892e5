#include "client/lane_append.h"

#include <chrono>
#include <utility>
#include <vector>

#include "client/requests.h"

namespace kvservice::client {
namespace {

// Written, copied, stored and answered at the same time.
constexpr uint32_t kSlots = 4;
// Small enough that what one thread writes is still in a cache when the next one reads it.
constexpr size_t kAppendBytesAim = size_t{512} << 10;
// Room for the message beside its tensors.
constexpr size_t kMessageBytesMax = size_t{16} << 10;

class LaneAppend final : public AppendStream {
 public:
  LaneAppend(Core* core, std::shared_ptr<Lane> lane, const std::vector<uint32_t>& slots)
      : core_(core), lane_(std::move(lane)) {
    for (const uint32_t index : slots) slots_.push_back({.index = index});
  }
  ~LaneAppend() override {
    for (const Slot& slot : slots_) {
      if (slot.is_waiting) lane_->AbandonAppend(slot.index);
      lane_->ReturnAppendSlot(slot.index);
    }
  }

  Transport transport() const override { return Transport::kLane; }
  AppendLimits limits() const override {
    const size_t room = lane_->request_bytes();
    return {.token_bytes_aim = kAppendBytesAim,
            .bytes_max = room > kMessageBytesMax ? room - kMessageBytesMax : 0};
  }

  bool Write(const AppendPart& part) override {
    Slot& slot = slots_[next_];
    if (!End(&slot)) return false;
    next_ = (next_ + 1) % slots_.size();
    if (!lane_->BeginAppend(slot.index, part)) {
      status_ = absl::UnavailableError("the server is gone");
      return false;
    }
    handle_ = part.request.handle();
    slot.is_waiting = true;
    return true;
  }

  absl::Status Finish(v1::AppendResponse* response) override {
    // In the order of the messages: the first error counts.
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (!End(&slots_[(next_ + i) % slots_.size()])) return status_;
    }
    v1::GetRequest request;
    *request.mutable_handle() = handle_;
    v1::GetResponse got;
    const absl::Status status = core_->rpc->Get(request, &got);
    if (!status.ok()) return status;
    *response = std::move(response_);
    *response->mutable_sequence() = std::move(*got.mutable_sequence());
    return absl::OkStatus();
  }

 private:
  struct Slot {
    uint32_t index = 0;
    // For the answer.
    bool is_waiting = false;
  };

  // False after an error.
  bool End(Slot* slot) {
    if (!status_.ok() || !slot->is_waiting) return status_.ok();
    const auto answered = lane_->EndAppend(
        slot->index, std::chrono::steady_clock::now() + core_->options.deadlines.admin);
    if (!answered.ok()) {
      // The slot may still be the server's.
      status_ = answered.status();
      return false;
    }
    slot->is_waiting = false;
    response_.set_message_count(response_.message_count() + answered->message_count());
    response_.set_duplicate_count(response_.duplicate_count() + answered->duplicate_count());
    return true;
  }

  Core* const core_;
  const std::shared_ptr<Lane> lane_;
  std::vector<Slot> slots_;
  size_t next_ = 0;
  v1::SequenceHandle handle_;
  v1::AppendResponse response_;
  absl::Status status_;
};

}  // namespace

std::unique_ptr<AppendStream> OpenLaneAppend(Core* core) {
  std::shared_ptr<Lane> lane = core->lane.Get();
  // What is sent is not repeated, so that a server which has gone unnoticed would fail the append.
  if (lane == nullptr || !lane->IsConnected()) return nullptr;
  const std::vector<uint32_t> slots = lane->ReserveAppendSlots(kSlots);
  if (slots.empty()) return nullptr;
  return std::make_unique<LaneAppend>(core, std::move(lane), slots);
}

}  // namespace kvservice::client
