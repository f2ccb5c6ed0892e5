#include "client/prepared_attend.h"

#include <cassert>
#include <chrono>
#include <utility>

#include "client/core.h"
#include "client/error.h"
#include "client/requests.h"
#include "client/status.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice::client {

struct PreparedAttend::State {
  std::shared_ptr<Lane> lane;
  PreparedSlot slot;
  StepBuffers* buffers = nullptr;
  v1::AttendRequest request;
  std::chrono::milliseconds time_max{0};
};

absl::StatusOr<PreparedAttend> PreparedAttend::Prepare(Core* core, const AttendStep& step) {
  if (step.buffers == nullptr) return InvalidRequest("buffers", "are missing");
  auto state = std::make_unique<State>();
  absl::Status status = StepToProto(step, &state->request);
  if (!status.ok()) return status;
  state->lane = core->lane.Get();
  if (state->lane == nullptr) {
    return MakeError(static_cast<int>(absl::StatusCode::kFailedPrecondition),
                     "calls are prepared in shared memory, and there is no lane at present",
                     kLaneUnavailable);
  }
  state->request.set_step_id(++core->steps);
  absl::StatusOr<PreparedSlot> slot = state->lane->PrepareAttend(step, &state->request);
  if (!slot.ok()) return slot.status();
  state->slot = *slot;
  state->buffers = step.buffers;
  state->time_max = core->options.deadlines.data;
  return PreparedAttend(std::move(state));
}

PreparedAttend::PreparedAttend(std::unique_ptr<State> state) : state_(std::move(state)) {}

PreparedAttend::PreparedAttend(PreparedAttend&& other) noexcept = default;

PreparedAttend::~PreparedAttend() {
  if (state_ != nullptr) state_->lane->DropPrepared(state_->slot.index);
}

const Doorbell& PreparedAttend::doorbell() const { return state_->slot.doorbell; }

absl::Span<const float> PreparedAttend::lse() const { return state_->slot.lse; }

absl::Span<const float> PreparedAttend::out() const { return state_->slot.out; }

void PreparedAttend::Ring() { state_->lane->RingPrepared(state_->slot.index); }

absl::StatusOr<AttendResult> PreparedAttend::Finish() {
  assert(state_ != nullptr);
  const std::unique_ptr<State> state = std::move(state_);
  return state->lane->EndPrepared(state->slot.index, state->request, state->buffers,
                                  std::chrono::steady_clock::now() + state->time_max);
}

}  // namespace kvservice::client
