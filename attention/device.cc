#include "attention/device.h"

#include "absl/strings/str_cat.h"
#include "attention/cpu/device.h"
#ifdef KVSERVICE_HAS_CUDA
#include "attention/cuda/device.h"
#endif
#include "attention/reference/device.h"

namespace kvservice {

absl::StatusOr<std::unique_ptr<Device>> NewDevice(std::string_view name,
                                                  const DeviceOptions& options) {
  if (name == "reference") return NewReferenceDevice(options);
  if (name == "cpu" || name == "auto") return NewCpuDevice(options);
  if (name == "cuda") {
#ifdef KVSERVICE_HAS_CUDA
    return NewCudaDevice(options);
#else
    return absl::UnavailableError("this build has no CUDA device");
#endif
  }
  return absl::InvalidArgumentError(absl::StrCat("device is '",
                                                 absl::string_view(name.data(), name.size()),
                                                 "', expected auto, cpu, cuda or reference"));
}

}  // namespace kvservice
