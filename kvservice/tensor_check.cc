#include "kvservice/tensor_check.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

std::string DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBfloat16:
      return "bfloat16";
  }
  return absl::StrCat("type ", static_cast<int>(dtype));
}

bool IsKnown(DType dtype) { return dtype <= DType::kBfloat16; }

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[",
                      absl::StrJoin(shape, ", ",
                                    [](std::string* out, int64_t extent) {
                                      absl::StrAppend(
                                          out, extent == kAnyExtent ? "n" : absl::StrCat(extent));
                                    }),
                      "]");
}

absl::Status Mismatch(const TensorView& tensor, const char* reason, const std::string& what,
                      std::string got, std::string expected) {
  const std::string field(tensor.field);
  const std::string message = absl::StrCat(field, " has ", what, " ", got, ", expected ", expected);
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.reason = reason,
                    .field = field,
                    .metadata = {{"got", std::move(got)}, {"expected", std::move(expected)}}});
}

bool HasShape(absl::Span<const int64_t> shape, const std::array<int64_t, 3>& expected) {
  if (shape.size() != expected.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 1) return false;
    if (expected[i] != kAnyExtent && shape[i] != expected[i]) return false;
  }
  return true;
}

// A number is not finite if its exponent is all ones. Adding one unit of the exponent to the number
// without its sign carries into the sign bit exactly then, so a block needs one and, one add and
// one or per element, which every compiler vectorises.
template <typename Bits>
bool AnyNotFinite(const std::byte* data, size_t count, Bits exponent_unit) {
  constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  Bits seen = 0;
  for (size_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
    seen = static_cast<Bits>(seen | static_cast<Bits>((bits & ~kSign) + exponent_unit));
  }
  return (seen & kSign) != 0;
}

// Index of the first element that is not finite, `count` if there is none.
template <typename Bits>
size_t FirstNotFinite(const std::byte* data, size_t count, Bits exponent_unit) {
  constexpr size_t kStep = 256;
  size_t begin = 0;
  // The full steps have a constant length: that is what lets -O2 vectorise them.
  while (begin + kStep <= count &&
         !AnyNotFinite(data + begin * sizeof(Bits), kStep, exponent_unit)) {
    begin += kStep;
  }
  const size_t end = std::min(count, begin + kStep);
  while (begin < end && !AnyNotFinite(data + begin * sizeof(Bits), 1, exponent_unit)) ++begin;
  return begin;
}

size_t FirstNotFinite(DType dtype, const std::byte* data, size_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return FirstNotFinite<uint32_t>(data, count, 1U << 23);
    case DType::kFloat16:
      return FirstNotFinite<uint16_t>(data, count, 1U << 10);
    case DType::kBfloat16:
      return FirstNotFinite<uint16_t>(data, count, 1U << 7);
  }
  return 0;
}

}  // namespace

std::optional<size_t> TensorBytes(DType dtype, absl::Span<const int64_t> shape) {
  size_t bytes = ElementBytes(dtype);
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes)) {
      return std::nullopt;
    }
  }
  return bytes;
}

absl::Status CheckTensor(const TensorView& tensor, const TensorExpectation& expected) {
  if (!IsKnown(tensor.dtype) || tensor.dtype != expected.dtype.value_or(tensor.dtype)) {
    return Mismatch(
        tensor, "TENSOR_DTYPE_MISMATCH", "type", DTypeName(tensor.dtype),
        expected.dtype.has_value() ? DTypeName(*expected.dtype) : "float32, float16 or bfloat16");
  }
  if (!HasShape(tensor.shape, expected.shape)) {
    return Mismatch(tensor, "TENSOR_SHAPE_MISMATCH", "shape", ShapeText(tensor.shape),
                    ShapeText(expected.shape));
  }
  const std::optional<size_t> bytes = TensorBytes(tensor.dtype, tensor.shape);
  if (bytes != tensor.bytes.size()) {
    return Mismatch(tensor, "TENSOR_SIZE_MISMATCH", "bytes", absl::StrCat(tensor.bytes.size()),
                    bytes.has_value() ? absl::StrCat(*bytes) : "a size that fits 64 bits");
  }
  return absl::OkStatus();
}

bool CopyFinite(DType dtype, const std::byte* from, size_t bytes, std::byte* to) {
  // A fraction of the first cache.
  constexpr size_t kStepBytes = 8192;
  bool is_finite = true;
  for (size_t begin = 0; begin < bytes; begin += kStepBytes) {
    const size_t step = std::min(kStepBytes, bytes - begin);
    std::memcpy(to + begin, from + begin, step);
    is_finite = is_finite && IsFinite(dtype, to + begin, step);
  }
  return is_finite;
}

bool IsFinite(DType dtype, const std::byte* data, size_t bytes) {
  const size_t count = bytes / ElementBytes(dtype);
  return FirstNotFinite(dtype, data, count) == count;
}

absl::Status CheckFinite(const TensorView& tensor, size_t begin, size_t count) {
  if (tensor.is_finite) return absl::OkStatus();
  const std::byte* data = tensor.bytes.data() + begin * ElementBytes(tensor.dtype);
  const size_t index = FirstNotFinite(tensor.dtype, data, count);
  if (index == count) return absl::OkStatus();
  const std::string field(tensor.field);
  return MakeError(absl::StatusCode::kInvalidArgument,
                   absl::StrCat(field, " is not finite at element ", begin + index),
                   {.reason = "TENSOR_NOT_FINITE",
                    .field = field,
                    .metadata = {{"index", absl::StrCat(begin + index)}}});
}

}  // namespace kvservice
