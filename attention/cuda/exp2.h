// The error of the hardware's exponential, from which scans make weights (Exp2 in elements-inl.h).

#ifndef KVSERVICE_ATTENTION_CUDA_EXP2_H_
#define KVSERVICE_ATTENTION_CUDA_EXP2_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvservice::cuda {

// |log2 Exp2(x) - x| is at most this where 2^x is a normal number of up to 2. The hardware's
// results are documented to be within 2 ulps, 0.72 of it; tests/attention/cuda_exp2_test.cc tries
// every float. Smaller results are 0.
inline constexpr float kExp2Error = 0x1p-21F;

// The largest |log2 Exp2(x) - x| over all floats x whose bits lie in [first, last], if it is above
// `worst`, in device memory. NaN counts as infinity.
cudaError_t RaiseToExp2Error(uint32_t first, uint32_t last, double* worst, cudaStream_t stream);

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_EXP2_H_
