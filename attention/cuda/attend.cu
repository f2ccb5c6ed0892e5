#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

template <int kType>
cudaError_t AttendTyped(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat32>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kBfloat16>(const AttendCall& call, cudaStream_t stream);

template <int kType>
cudaError_t AttendQuick(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendQuick<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendQuick<kBfloat16>(const AttendCall& call, cudaStream_t stream);

template <int kType>
cudaError_t AttendProven(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendProven<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendProven<kBfloat16>(const AttendCall& call, cudaStream_t stream);

namespace {

// Sums of 256 channels in double do not fit the registers.
constexpr uint32_t kProvenDimMax = 128;

bool UsesTensorCores(const AttendCall& call) {
  if (call.shape.dtype == kFloat32) return false;
  return !call.bound_masses || call.shape.head_dim <= kProvenDimMax;
}

}  // namespace

AttendTiling AttendTilingOf(const AttendCall& call) {
  const uint32_t heads = call.head_count_max;
  if (UsesTensorCores(call)) {
    // Nor do eight heads of 256 channels.
    const bool wide = call.shape.head_dim > kProvenDimMax;
    return {.heads = heads <= 4 || wide ? 4U : 8U, .ctas = wide ? 1U : 2U};
  }
  if (heads == 1) return {.heads = 1, .ctas = 3};
  return {.heads = heads <= 4 ? 4U : 8U, .ctas = heads <= 4 ? 3U : 2U};
}

cudaError_t Attend(const AttendCall& call, cudaStream_t stream) {
  if (call.job_count == 0) return cudaSuccess;
  const bool half = call.shape.dtype == kFloat16;
  if (UsesTensorCores(call)) {
    if (call.bound_masses) {
      return half ? AttendProven<kFloat16>(call, stream) : AttendProven<kBfloat16>(call, stream);
    }
    return half ? AttendQuick<kFloat16>(call, stream) : AttendQuick<kBfloat16>(call, stream);
  }
  if (call.shape.dtype == kFloat32) return AttendTyped<kFloat32>(call, stream);
  return half ? AttendTyped<kFloat16>(call, stream) : AttendTyped<kBfloat16>(call, stream);
}

}  // namespace kvservice::cuda
