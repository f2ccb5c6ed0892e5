// Tensors of calls of attention in memory of the library: where client and server share memory they
// are written and read in place, and nothing is copied on the client's side.
//
//   auto buffers = client->NewStepBuffers({.token_count = 8, .query_head_count = 32, ...});
//   ... write buffers->q(), buffers->k(), buffers->v() ...
//   AttendStep step{.layer = 3, .rows = rows};
//   step.SetBuffers(&*buffers, /*store=*/true);
//   auto result = client->Attend(step);
//   ... read buffers->out() ...

#ifndef KVSERVICE_CLIENT_STEP_BUFFERS_H_
#define KVSERVICE_CLIENT_STEP_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/tensor.h"

namespace kvservice::client {

// Inside the library only.
class Lane;
struct Core;

struct AttendResult;
struct AttendStep;

struct StepShape {
  uint32_t token_count = 0;
  uint32_t query_head_count = 0;
  uint32_t kv_head_count = 0;
  uint32_t head_dim = 0;
  DType q_dtype = DType::kFloat32;
  // The model's cache type.
  DType kv_dtype = DType::kBfloat16;
};

// Made by Client::NewStepBuffers. Move-only; one thread at a time, and not while a call uses it.
// Holds one of the client's LaneOptions::calls_max for as long as it lives.
class StepBuffers {
 public:
  StepBuffers(const StepShape& shape, std::shared_ptr<Lane> lane);
  ~StepBuffers();
  StepBuffers(StepBuffers&& other) noexcept;
  StepBuffers& operator=(StepBuffers&&) = delete;

  const StepShape& shape() const { return shape_; }
  // [token_count][query_head_count][head_dim] and [token_count][kv_head_count][head_dim], to be
  // written before a call, which leaves them as they are. 64-byte aligned in shared memory.
  absl::Span<std::byte> q() const { return q_; }
  absl::Span<std::byte> k() const { return k_; }
  absl::Span<std::byte> v() const { return v_; }
  // All of the memory that q, k and v, and outputs that stay, are in, from the start of a page:
  // what to register with a GPU's driver, so that it copies there by itself. The same for all
  // buffers of a lane, and there as long as any of them. Empty where none is shared.
  absl::Span<std::byte> shared_memory() const;
  TensorView q_view() const;
  TensorView k_view() const;
  TensorView v_view() const;

  // [token_count][query_head_count][head_dim] of the last call that succeeded, until the next one
  // begins; zeros for rows that failed. Empty before.
  absl::Span<const float> out() const { return out_; }

 private:
  friend class Lane;
  friend absl::StatusOr<AttendResult> Attend(Core* core, const AttendStep& step);

  size_t tensor_bytes() const { return static_cast<size_t>(v_.data() + v_.size() - q_.data()); }
  void PlaceTensors(absl::Span<std::byte> memory);
  // The bytes of float32 outputs; copied unless they stay where they are.
  void KeepOutputs(absl::Span<const std::byte> payload, bool stays);

  StepShape shape_;
  // Its slot is this object's; nullptr when there was none to have. Calls of a lane outlive it.
  std::shared_ptr<Lane> lane_;
  uint32_t slot_ = 0;
  // Instead of shared memory.
  std::vector<std::byte> own_tensors_;
  std::vector<float> own_out_;

  absl::Span<std::byte> q_, k_, v_;
  absl::Span<const float> out_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_STEP_BUFFERS_H_
