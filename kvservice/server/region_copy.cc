#include "kvservice/server/region_copy.h"

#include <string>

#include "kvservice/error.h"
#include "kvservice/tensor_check.h"
#include "wire/lane_layout.h"

namespace kvservice {
namespace {

absl::Status Invalid(std::string_view field, const char* member, const char* reason,
                     const std::string& problem) {
  const std::string path = std::string(field) + ".region." + member;
  return InvalidField(path, reason, path + " " + problem);
}

}  // namespace

RegionCopy::RegionCopy(absl::Span<const std::byte> shared, size_t bytes_max)
    : shared_(shared),
      bytes_max_(bytes_max),
      copy_(std::make_unique_for_overwrite<std::byte[]>(bytes_max)) {}

absl::StatusOr<RegionCopy::Payload> RegionCopy::Take(const v1::TensorRegion& range, DType dtype,
                                                     size_t bytes, std::string_view field) {
  if (!range.region().empty()) {
    return Invalid(field, "region", "TENSOR_REGION_UNKNOWN",
                   "is given, expected none: the memory is the lane's");
  }
  if (range.length_bytes() != bytes) {
    return Invalid(field, "length_bytes", "TENSOR_SIZE_MISMATCH",
                   "is " + std::to_string(range.length_bytes()) + ", the shape needs " +
                       std::to_string(bytes));
  }
  if (range.offset_bytes() % wire::kLaneAlignment != 0) {
    return Invalid(field, "offset_bytes", "TENSOR_REGION_MISALIGNED",
                   "is " + std::to_string(range.offset_bytes()) + ", expected a multiple of " +
                       std::to_string(wire::kLaneAlignment));
  }
  if (!wire::IsRange(range.offset_bytes(), bytes, shared_.size())) {
    return Invalid(field, "offset_bytes", "TENSOR_REGION_OUT_OF_RANGE",
                   "is " + std::to_string(range.offset_bytes()) + ", with " +
                       std::to_string(bytes) + " bytes beyond the memory's " +
                       std::to_string(shared_.size()));
  }
  if (!wire::IsRange(used_, bytes, bytes_max_)) {
    return Invalid(field, "length_bytes", "TENSOR_REGION_TOO_LARGE",
                   "is " + std::to_string(bytes) + " beside the call's other " +
                       std::to_string(used_) + ", expected at most " + std::to_string(bytes_max_) +
                       " together");
  }
  std::byte* const copy = copy_.get() + used_;
  used_ = (used_ + bytes + wire::kLaneAlignment - 1) / wire::kLaneAlignment * wire::kLaneAlignment;
  const absl::Span<const std::byte> from = shared_.subspan(range.offset_bytes(), bytes);
  if (leaves_large_ && bytes > kLeftBytesMin) return Payload{.bytes = from, .is_shared = true};
  const bool is_finite = CopyFinite(dtype, from.data(), bytes, copy);
  return Payload{.bytes = {copy, bytes}, .is_finite = is_finite};
}

}  // namespace kvservice
