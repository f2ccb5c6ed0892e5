#include "client/step_buffers.h"

#include <cstring>
#include <optional>
#include <utility>

#include "client/lane.h"
#include "client/requests.h"
#include "wire/lane_layout.h"

namespace kvservice::client {
namespace {

size_t QueryBytes(const StepShape& shape) {
  return size_t{shape.token_count} * shape.query_head_count * shape.head_dim *
         ElementBytes(shape.q_dtype);
}

size_t KeyBytes(const StepShape& shape) {
  return size_t{shape.token_count} * shape.kv_head_count * shape.head_dim *
         ElementBytes(shape.kv_dtype);
}

}  // namespace

StepBuffers::StepBuffers(const StepShape& shape, std::shared_ptr<Lane> lane) : shape_(shape) {
  const size_t bytes = wire::AlignUp(QueryBytes(shape)) + 2 * wire::AlignUp(KeyBytes(shape));
  const std::optional<uint32_t> slot = lane != nullptr ? lane->ReserveSlot(bytes) : std::nullopt;
  if (!slot.has_value()) {
    own_tensors_.resize(bytes);
    PlaceTensors(absl::MakeSpan(own_tensors_));
    return;
  }
  lane_ = std::move(lane);
  slot_ = *slot;
  PlaceTensors(lane_->RequestMemory(slot_).first(bytes));
}

StepBuffers::~StepBuffers() {
  if (lane_ != nullptr) lane_->ReturnSlot(slot_);
}

StepBuffers::StepBuffers(StepBuffers&& other) noexcept = default;

void StepBuffers::PlaceTensors(absl::Span<std::byte> memory) {
  q_ = memory.first(QueryBytes(shape_));
  k_ = memory.subspan(wire::AlignUp(q_.size()), KeyBytes(shape_));
  v_ = memory.subspan(wire::AlignUp(q_.size()) + wire::AlignUp(k_.size()), k_.size());
}

absl::Span<std::byte> StepBuffers::shared_memory() const {
  return lane_ != nullptr ? lane_->memory() : absl::Span<std::byte>();
}

TensorView StepBuffers::q_view() const {
  return {.dtype = shape_.q_dtype,
          .token_count = shape_.token_count,
          .head_count = shape_.query_head_count,
          .head_dim = shape_.head_dim,
          .bytes = q_};
}

TensorView StepBuffers::k_view() const {
  return {.dtype = shape_.kv_dtype,
          .token_count = shape_.token_count,
          .head_count = shape_.kv_head_count,
          .head_dim = shape_.head_dim,
          .bytes = k_};
}

TensorView StepBuffers::v_view() const {
  TensorView view = k_view();
  view.bytes = v_;
  return view;
}

void StepBuffers::KeepOutputs(absl::Span<const std::byte> payload, bool stays) {
  const auto* const floats = reinterpret_cast<const float*>(payload.data());
  const size_t count = payload.size() / sizeof(float);
  if (stays) {
    out_ = {floats, count};
    return;
  }
  own_out_.resize(count);
  std::memcpy(own_out_.data(), payload.data(), count * sizeof(float));
  out_ = own_out_;
}

}  // namespace kvservice::client
