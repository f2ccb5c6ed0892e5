#include "attention/cuda/attend_mma-inl.h"

namespace kvservice::cuda {

template cudaError_t AttendMmaTyped<kFloat16>(const AttendCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda
