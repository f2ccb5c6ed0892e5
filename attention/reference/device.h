// The reference device: plan semantics in plain scalar double arithmetic, one thread, no thought of
// speed. It is the oracle that every other device is compared with and shares only sketches, lists
// and certificate arithmetic with them.

#ifndef KVSERVICE_ATTENTION_REFERENCE_DEVICE_H_
#define KVSERVICE_ATTENTION_REFERENCE_DEVICE_H_

#include <memory>

#include "attention/device.h"

namespace kvservice {

// Any thread. Options are accepted and change nothing: this device has one thread.
std::unique_ptr<Device> NewReferenceDevice(const DeviceOptions& options);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_REFERENCE_DEVICE_H_
