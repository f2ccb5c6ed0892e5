#include "attention/cuda/exp2.h"

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {
namespace {

__global__ void Exp2ErrorKernel(uint32_t first, uint32_t last, double* worst) {
  double largest = 0.0;
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t bits = first + uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; bits <= last;
       bits += stride) {
    const float x = __uint_as_float(static_cast<uint32_t>(bits));
    // Within 2^-50: exp2 of a double is within an ulp.
    const double ratio = static_cast<double>(Exp2(x)) * exp2(-static_cast<double>(x));
    const double error = fabs(log2(ratio));
    largest = error <= largest ? largest : (error == error ? error : HUGE_VAL);
  }
  // Numbers that are not negative are ordered as their bits are.
  atomicMax(reinterpret_cast<unsigned long long*>(worst),
            static_cast<unsigned long long>(__double_as_longlong(largest)));
}

}  // namespace

cudaError_t RaiseToExp2Error(uint32_t first, uint32_t last, double* worst, cudaStream_t stream) {
  Exp2ErrorKernel<<<4096, 256, 0, stream>>>(first, last, worst);
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
