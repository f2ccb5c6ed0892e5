#include "attention/device.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/cpu/device.h"
#ifdef KVSERVICE_HAS_CUDA
#include "attention/cuda/device.h"
#endif
#include "attention/reference/device.h"

namespace kvservice {
namespace {

absl::StatusOr<std::unique_ptr<Device>> NewCuda(const DeviceOptions& options) {
#ifdef KVSERVICE_HAS_CUDA
  return NewCudaDevice(options);
#else
  static_cast<void>(options);
  return absl::UnavailableError("this build has no CUDA device");
#endif
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> NewDevice(std::string_view name,
                                                  const DeviceOptions& options) {
  if (name == "reference") return NewReferenceDevice(options);
  if (name == "cpu") return NewCpuDevice(options);
  if (name == "cuda") return NewCuda(options);
  if (name == "auto") {
    absl::StatusOr<std::unique_ptr<Device>> cuda = NewCuda(options);
    return absl::IsUnavailable(cuda.status()) ? NewCpuDevice(options) : std::move(cuda);
  }
  return absl::InvalidArgumentError(absl::StrCat("device is '",
                                                 absl::string_view(name.data(), name.size()),
                                                 "', expected auto, cpu, cuda or reference"));
}

}  // namespace kvservice
