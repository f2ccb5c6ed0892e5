// A client whose calls make an engine do next to nothing: one row attends one token, and the rest
// of the payload belongs to a row that names no sequence, so that its outputs are zeros. Payloads
// are of the queries on the way there and of the outputs on the way back, alike.

#ifndef KVSERVICE_TESTS_BENCH_RPC_CALLER_H_
#define KVSERVICE_TESTS_BENCH_RPC_CALLER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"

namespace kvservice::bench {

// One thread.
class RpcCaller {
 public:
  // payload_bytes: a multiple of 4096. With `in_place` queries lie in shared memory (StepBuffers).
  static absl::StatusOr<std::unique_ptr<RpcCaller>> Make(const client::ClientOptions& options,
                                                         size_t payload_bytes, bool in_place);
  ~RpcCaller();
  RpcCaller(const RpcCaller&) = delete;
  RpcCaller& operator=(const RpcCaller&) = delete;

  // Checks that the outputs of the row that is attended are its value.
  absl::Status Call();

  // Of every call, what the server says; and for whoever measures.
  std::vector<double> in_server_seconds, seconds;

 private:
  RpcCaller(std::unique_ptr<client::Client> client, size_t payload_bytes);
  absl::Status Prepare();
  void UseBuffers();

  const std::unique_ptr<client::Client> client_;
  const uint32_t token_count_;
  const uint32_t head_count_;
  const std::vector<float> q_;
  std::unique_ptr<client::Sequence> sequence_, foreign_;
  std::vector<client::AttendRow> rows_;
  std::optional<client::StepBuffers> buffers_;
};

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_RPC_CALLER_H_
