#include "kvservice/tensor_copies.h"

#include <algorithm>
#include <array>

#include "kvservice/tensor_check.h"

namespace kvservice {
namespace {

// Of each copy: what vector loads like.
constexpr size_t kAlignment = 64;

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::array<TensorView*, 3> TensorsOf(AttendCall* call) {
  return {&call->q, call->k.has_value() ? &*call->k : nullptr,
          call->v.has_value() ? &*call->v : nullptr};
}

}  // namespace

void TensorCopies::Begin(absl::Span<AttendCall* const> calls) {
  size_t bytes = kAlignment;  // to begin at a multiple of it
  for (AttendCall* call : calls) {
    for (const TensorView* tensor : TensorsOf(call)) {
      if (tensor != nullptr && tensor->is_shared) bytes += Aligned(tensor->bytes.size());
    }
  }
  if (bytes > capacity_) {
    capacity_ = std::max(bytes, 2 * capacity_);
    memory_ = std::make_unique_for_overwrite<std::byte[]>(capacity_);
  }
  used_ = Aligned(reinterpret_cast<uintptr_t>(memory_.get())) -
          reinterpret_cast<uintptr_t>(memory_.get());
}

void TensorCopies::Take(AttendCall* call, Device* device) {
  const auto row_count = static_cast<uint32_t>(call->rows.size());
  first_tokens_.assign(1, 0);
  for (const AttendCallRow& row : call->rows) {
    first_tokens_.push_back(first_tokens_.back() + row.query_count);
  }
  const std::array<TensorView*, 3> tensors = TensorsOf(call);
  std::array<std::byte*, 3> places{};
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] == nullptr || !tensors[i]->is_shared) continue;
    places[i] = memory_.get() + used_;
    used_ += Aligned(tensors[i]->bytes.size());
  }
  finite_.assign(row_count, 1);
  if (first_tokens_.back() == 0) return;
  device->ParallelFor(row_count, [&](uint32_t row) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const TensorView* const tensor = tensors[i];
      if (tensor == nullptr || (tensor->is_finite && !tensor->is_shared)) continue;
      const size_t token_bytes = tensor->bytes.size() / first_tokens_.back();
      const size_t begin = first_tokens_[row] * token_bytes;
      const size_t bytes = first_tokens_[row + 1] * token_bytes - begin;
      const std::byte* const from = tensor->bytes.data() + begin;
      const bool is_finite = places[i] != nullptr
                                 ? CopyFinite(tensor->dtype, from, bytes, places[i] + begin)
                                 : IsFinite(tensor->dtype, from, bytes);
      if (!is_finite) finite_[row] = 0;
    }
  });
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (places[i] == nullptr) continue;
    tensors[i]->bytes = {places[i], tensors[i]->bytes.size()};
    tensors[i]->is_shared = false;
  }
}

}  // namespace kvservice
