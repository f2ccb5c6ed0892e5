// What a client, its sequences and its writers share. Inside the library only.

#ifndef KVSERVICE_CLIENT_CORE_H_
#define KVSERVICE_CLIENT_CORE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "client/attend.h"
#include "client/drop_queue.h"
#include "client/lane.h"
#include "client/options.h"
#include "client/rpc.h"
#include "client/stream_path.h"

namespace kvservice::client {

// Any thread; members are constant or have their own synchronisation.
struct Core {
  explicit Core(const ClientOptions& client_options)
      : options(client_options),
        rpc(NewRpc(client_options)),
        lane(&options),
        streams(rpc.get()),
        drops(rpc.get(), client_options.deadlines.data) {}

  const ClientOptions options;
  const std::unique_ptr<Rpc> rpc;
  LanePath lane;
  StreamPath streams;
  DropQueue drops;
  // Random, different for every client: request ids begin with it.
  std::string request_id_prefix;
  std::atomic<uint64_t> requests{0};
  std::atomic<uint64_t> steps{0};
  // Sequences that borrow this.
  std::atomic<int64_t> borrowers{0};
};

absl::StatusOr<AttendResult> Attend(Core* core, const AttendStep& step);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_CORE_H_
