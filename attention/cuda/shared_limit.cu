#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>

#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

cudaError_t RaiseSharedLimit(const void* kernel, size_t bytes) {
  // One GPU per process. Never destroyed: threads may launch until the process has ended.
  static auto& mutex = *new std::mutex;
  static auto& limits = *new std::map<const void*, size_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [limit, inserted] = limits.try_emplace(kernel, 0);
  if (!inserted && bytes <= limit->second) return cudaSuccess;
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(bytes));
  if (code == cudaSuccess && inserted) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
  }
  if (code == cudaSuccess) limit->second = bytes;
  return code;
}

}  // namespace kvservice::cuda
