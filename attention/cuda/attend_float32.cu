#include "attention/cuda/attend-inl.h"

namespace kvservice::cuda {

template cudaError_t AttendTyped<kFloat32>(const AttendCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda
