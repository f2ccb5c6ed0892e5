// The device on NVIDIA GPUs (compute capability 8.0 and up): rows, sketches and all that reads them
// are on the GPU. Groups whose plans are simple are answered there in one go (direct.h). What other
// plans mean (which tokens are always read, what a choice is, when a proof wants more) is decided
// on the host, by the same code as the CPU device (attention/cpu/group.h), so such a call waits for
// the GPU between its steps.
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

// KV heads of rows that a device of this kind has answered without the host's decisions, for tests:
// a path that is never taken tests nothing.
uint64_t GroupsAnsweredDirectly(const Device& cuda_device);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CUDA_DEVICE_H_
