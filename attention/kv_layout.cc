#include "attention/kv_layout.h"

#include "absl/strings/str_cat.h"

namespace kvservice {

absl::Status ValidateLayout(const KvLayout& layout) {
  switch (layout.head_dim) {
    case 64:
    case 80:
    case 96:
    case 128:
    case 256:
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("head_dim is ", layout.head_dim, ", expected 64, 80, 96, 128 or 256"));
  }
  if (layout.kv_head_count == 0) {
    return absl::InvalidArgumentError("kv_head_count is 0, expected at least 1");
  }
  if (layout.query_head_count == 0 || layout.query_head_count % layout.kv_head_count != 0 ||
      layout.group_size() > kGroupMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "query_head_count is ", layout.query_head_count, ", expected a multiple of kv_head_count ",
        layout.kv_head_count, ", at most ", kGroupMax, " times it"));
  }
  if (layout.dtype != DType::kFloat32 && layout.dtype != DType::kFloat16 &&
      layout.dtype != DType::kBfloat16) {
    return absl::InvalidArgumentError(absl::StrCat("dtype is ", static_cast<int>(layout.dtype),
                                                   ", expected float32, float16 or bfloat16"));
  }
  return absl::OkStatus();
}

}  // namespace kvservice
