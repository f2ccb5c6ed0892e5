// Views of a caller's tensors. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_TENSOR_H_
#define KVSERVICE_CLIENT_TENSOR_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"

namespace kvservice::client {

// Element types, little endian.
enum class DType : uint8_t { kFloat32, kFloat16, kBfloat16 };

// Vectors of some heads of some tokens, dense: [token_count][head_count][head_dim]. Borrows the
// bytes for the duration of a call. A view without bytes means that the tensor is absent.
struct TensorView {
  DType dtype = DType::kFloat32;
  uint32_t token_count = 0;
  uint32_t head_count = 0;
  uint32_t head_dim = 0;
  absl::Span<const std::byte> bytes = {};

  bool empty() const { return bytes.empty(); }
};

// values: [token_count][head_count][head_dim].
inline TensorView Float32View(absl::Span<const float> values, uint32_t token_count,
                              uint32_t head_count, uint32_t head_dim) {
  return {
      .dtype = DType::kFloat32,
      .token_count = token_count,
      .head_count = head_count,
      .head_dim = head_dim,
      .bytes = {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(float)}};
}

// `bits` are bfloat16: the upper halves of float32. [token_count][head_count][head_dim].
inline TensorView Bfloat16View(absl::Span<const uint16_t> bits, uint32_t token_count,
                               uint32_t head_count, uint32_t head_dim) {
  return {
      .dtype = DType::kBfloat16,
      .token_count = token_count,
      .head_count = head_count,
      .head_dim = head_dim,
      .bytes = {reinterpret_cast<const std::byte*>(bits.data()), bits.size() * sizeof(uint16_t)}};
}

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_TENSOR_H_
