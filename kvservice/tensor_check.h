// Checks of tensors as they arrive: the one place that multiplies sizes a caller has sent. Pure
// functions; any thread.

#ifndef KVSERVICE_KVSERVICE_TENSOR_CHECK_H_
#define KVSERVICE_KVSERVICE_TENSOR_CHECK_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/kv_layout.h"
#include "kvservice/engine.h"

namespace kvservice {

// Bytes of a row-major tensor; nothing if an extent is negative or the product does not fit.
std::optional<size_t> TensorBytes(DType dtype, absl::Span<const int64_t> shape);

// Extents that a tensor must have; kAnyExtent = at least 1.
inline constexpr int64_t kAnyExtent = -1;
struct TensorExpectation {
  std::array<int64_t, 3> shape = {kAnyExtent, kAnyExtent, kAnyExtent};
  // Nothing = any known type.
  std::optional<DType> dtype;
};

// INVALID_ARGUMENT naming tensor.field: TENSOR_DTYPE_MISMATCH, TENSOR_SHAPE_MISMATCH,
// TENSOR_SIZE_MISMATCH, checked in this order.
absl::Status CheckTensor(const TensorView& tensor, const TensorExpectation& expected);

// Copies elements of a known type, and says whether all of what it copied is finite: cheaper than
// to look at them when they have left the nearest cache. `from` may change meanwhile.
bool CopyFinite(DType dtype, const std::byte* from, size_t bytes, std::byte* to);

// True if all elements of a known type are finite.
bool IsFinite(DType dtype, const std::byte* data, size_t bytes);

// INVALID_ARGUMENT / TENSOR_NOT_FINITE, with the index of the first NaN or infinity within the
// tensor, if there is one among elements [begin, begin + count).
absl::Status CheckFinite(const TensorView& tensor, size_t begin, size_t count);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TENSOR_CHECK_H_
