// An append through its client's lane. Inside the library only.

#ifndef KVSERVICE_CLIENT_LANE_APPEND_H_
#define KVSERVICE_CLIENT_LANE_APPEND_H_

#include <memory>

#include "client/core.h"
#include "client/rpc.h"

namespace kvservice::client {

// nullptr when there is no lane, or it has no slots to spare. `core` is borrowed.
std::unique_ptr<AppendStream> OpenLaneAppend(Core* core);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_LANE_APPEND_H_
