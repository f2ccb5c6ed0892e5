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
#ifdef KVSERVICE_HAS_CUDA
  if (name == "cuda") return NewCudaDevice(options);
#endif
  if (name == "cpu" || name == "auto") return NewCpuDevice(options);
  return absl::InvalidArgumentError(absl::StrCat("device is '",
                                                 absl::string_view(name.data(), name.size()),
                                                 "', expected auto, cpu or reference"));
}

}  // namespace kvservice
