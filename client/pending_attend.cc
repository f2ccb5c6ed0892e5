#include "client/pending_attend.h"

#include <cassert>
#include <chrono>
#include <cstdint>
#include <future>
#include <optional>
#include <utility>

#include "client/core.h"
#include "client/requests.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice::client {

struct PendingAttend::State {
  Core* core = nullptr;
  AttendStep step;
  absl::Status status;
  // Through shared memory, where the call has a slot.
  std::shared_ptr<Lane> lane;
  uint32_t slot = 0;
  v1::AttendRequest request;
  std::chrono::steady_clock::time_point deadline;
  // Else a thread makes it.
  std::future<absl::StatusOr<AttendResult>> answer;
};

PendingAttend::PendingAttend(Core* core, const AttendStep& step, absl::Status status)
    : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.core = core;
  state.step = step;
  state.deadline = std::chrono::steady_clock::now() + core->options.deadlines.data;
  state.status = std::move(status);
  if (state.status.ok()) state.status = StepToProto(step, &state.request);
  if (!state.status.ok()) return;
  state.lane = core->lane.Get();
  if (state.lane != nullptr) {
    state.request.set_step_id(++core->steps);
    const std::optional<uint32_t> slot = state.lane->BeginAttend(state.step, &state.request);
    if (slot.has_value()) {
      state.slot = *slot;
      return;
    }
  }
  state.lane = nullptr;
  // Deferred to Wait where the system gives no thread: nothing here throws.
  state.answer = std::async(std::launch::async | std::launch::deferred,
                            [core, step] { return Attend(core, step); });
}

PendingAttend::PendingAttend(PendingAttend&& other) noexcept = default;

PendingAttend::~PendingAttend() {
  // A thread's call is waited for by its future.
  if (state_ != nullptr && state_->lane != nullptr) state_->lane->AbandonAttend(state_->slot);
}

absl::StatusOr<AttendResult> PendingAttend::Wait() {
  assert(state_ != nullptr);
  const std::unique_ptr<State> state = std::move(state_);
  if (!state->status.ok()) return state->status;
  if (state->lane == nullptr) return state->answer.get();
  auto answer =
      state->lane->EndAttend(state->slot, state->request, state->step.buffers, state->deadline);
  // Repeated by another way.
  if (!answer.has_value()) return Attend(state->core, state->step);
  return *std::move(answer);
}

}  // namespace kvservice::client
