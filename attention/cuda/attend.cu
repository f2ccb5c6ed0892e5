#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

template <int kType>
cudaError_t AttendTyped(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat32>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kBfloat16>(const AttendCall& call, cudaStream_t stream);

template <int kType>
cudaError_t AttendMmaTyped(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendMmaTyped<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendMmaTyped<kBfloat16>(const AttendCall& call, cudaStream_t stream);

namespace {

bool UsesTensorCores(const AttendCall& call) {
  return !call.bound_masses && call.shape.dtype != kFloat32;
}

}  // namespace

AttendTiling AttendTilingOf(const AttendCall& call) {
  const uint32_t heads = call.head_count_max;
  if (UsesTensorCores(call)) {
    // Eight heads of 256 channels do not fit the registers.
    const bool small = heads <= 4 || call.shape.head_dim > 128;
    return {.heads = small ? 4U : 8U, .ctas = call.shape.head_dim > 128 ? 1U : 2U};
  }
  if (heads == 1) return {.heads = 1, .ctas = 3};
  return {.heads = heads <= 4 ? 4U : 8U, .ctas = heads <= 4 ? 3U : 2U};
}

cudaError_t Attend(const AttendCall& call, cudaStream_t stream) {
  if (call.job_count == 0) return cudaSuccess;
  if (UsesTensorCores(call)) {
    return call.shape.dtype == kFloat16 ? AttendMmaTyped<kFloat16>(call, stream)
                                        : AttendMmaTyped<kBfloat16>(call, stream);
  }
  switch (call.shape.dtype) {
    case kFloat32:
      return AttendTyped<kFloat32>(call, stream);
    case kFloat16:
      return AttendTyped<kFloat16>(call, stream);
    default:
      return AttendTyped<kBfloat16>(call, stream);
  }
}

}  // namespace kvservice::cuda
