// The device on NVIDIA GPUs (compute capability 8.0 and up): rows, sketches and all that reads them
// are on the GPU. What a plan means (which tokens are always read, what a choice is, when a proof
// wants more) is decided on the host, by the same code as the CPU device (attention/cpu/group.h),
// so a call that chooses or proves waits for the GPU between its steps.
//
// One GPU, the first that the process sees, and one stream.

#ifndef KVSERVICE_ATTENTION_CUDA_DEVICE_H_
#define KVSERVICE_ATTENTION_CUDA_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "attention/device.h"

namespace kvservice {

// UNAVAILABLE without one, with the driver's reason. Any thread. thread_count of the options is the
// number of host threads that decide.
absl::StatusOr<std::unique_ptr<Device>> NewCudaDevice(const DeviceOptions& options);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CUDA_DEVICE_H_
