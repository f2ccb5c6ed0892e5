// The CPU device: the plan semantics of attention/plan.h on vector instructions (Highway, chosen at
// run time) and a fixed set of threads. Keys and values are read once per KV head for all query
// heads that share it; arithmetic is fp32 with masses in double, and every certificate contains the
// device's own rounding.

#ifndef KVSERVICE_ATTENTION_CPU_DEVICE_H_
#define KVSERVICE_ATTENTION_CPU_DEVICE_H_

#include <memory>

#include "attention/device.h"

namespace kvservice {

// Starts options.thread_count - 1 threads, which live as long as the device. Any thread.
std::unique_ptr<Device> NewCpuDevice(const DeviceOptions& options);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_DEVICE_H_
