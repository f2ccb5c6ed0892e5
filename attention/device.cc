#include "attention/device.h"

#include "absl/strings/str_cat.h"
#include "attention/cpu/device.h"
#include "attention/reference/device.h"

namespace kvservice {

absl::StatusOr<std::unique_ptr<Device>> NewDevice(std::string_view name,
                                                  const DeviceOptions& options) {
  if (name == "reference") return NewReferenceDevice(options);
  if (name == "cpu" || name == "auto") return NewCpuDevice(options);
  return absl::InvalidArgumentError(absl::StrCat("device is '",
                                                 absl::string_view(name.data(), name.size()),
                                                 "', expected auto, cpu or reference"));
}

}  // namespace kvservice
