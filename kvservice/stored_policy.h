// A policy as bytes, for the disk tier. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_STORED_POLICY_H_
#define KVSERVICE_KVSERVICE_STORED_POLICY_H_

#include "kvservice/cache/byte_codec.h"
#include "selector/policy.h"

namespace kvservice {

void WritePolicy(const Policy& policy, ByteWriter* writer);
// Fails the reader where the bytes are none; the numbers are not checked (ValidatePolicy does).
Policy ReadPolicy(ByteReader* reader);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORED_POLICY_H_
