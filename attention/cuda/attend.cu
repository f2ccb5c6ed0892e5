#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

template <int kType>
cudaError_t AttendTyped(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat32>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kFloat16>(const AttendCall& call, cudaStream_t stream);
extern template cudaError_t AttendTyped<kBfloat16>(const AttendCall& call, cudaStream_t stream);

uint32_t AttendTileHeads(uint32_t head_count) {
  if (head_count == 1) return 1;
  return head_count <= 4 ? 4 : 8;
}

cudaError_t Attend(const AttendCall& call, cudaStream_t stream) {
  if (call.job_count == 0) return cudaSuccess;
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
