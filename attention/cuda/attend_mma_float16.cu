#include "attention/cuda/attend_proven-inl.h"
#include "attention/cuda/attend_quick-inl.h"

namespace kvservice::cuda {

template cudaError_t AttendQuick<kFloat16>(const AttendCall& call, cudaStream_t stream);
template cudaError_t AttendProven<kFloat16>(const AttendCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda
