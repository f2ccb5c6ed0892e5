// Prefill: keys and values for one sequence, through the client's lane where it has one, else by a
// stream.

#ifndef KVSERVICE_CLIENT_APPEND_WRITER_H_
#define KVSERVICE_CLIENT_APPEND_WRITER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/options.h"
#include "client/tensor.h"

namespace kvservice::client {

class AppendStream;
struct AppendCut;
struct Core;

// What an append is worth when it is acknowledged.
enum class Durability : uint8_t {
  kMemory,   // It may be gone after a crash.
  kDurable,  // It is on the server's disk, synced, with all tokens of its layer before it.
};

// What the server has applied of a writer's messages.
struct Receipt {
  // Tokens that every layer has, and tokens of the longest layer.
  uint32_t length_tokens = 0;
  uint32_t length_max_tokens = 0;
  // Messages applied, and how many of them were stored already in full.
  uint64_t message_count = 0;
  uint64_t duplicate_count = 0;
  // How the latest of them travelled: kLane or kStream.
  Transport transport = Transport::kStream;
  // Tokens that every layer has on disk.
  uint32_t durable_tokens = 0;
};

// Some queries of the tokens that are written.
struct QuerySample {
  // [n][query_head_count][head_dim] float32, rotated, or absent. A model that was registered
  // without sketch tables learns some from such samples.
  TensorView q = {};
  // [n], ascending, of tokens of the same Write; or empty. With positions the queries also become
  // anchors, which saves the first steps of kCis and kCpe their scans: the server keeps the latest
  // 512 or so per layer. Without, at most 256 queries.
  absl::Span<const uint32_t> positions = {};
};

// Made by Sequence::Append. One thread; the client outlives it. Messages are applied one by one and
// in order, and repeating one is harmless: after an error, whatever was applied stays (through a
// lane also of the message behind the one that failed, if it is another layer's), and writing goes
// on from Sequence::Describe. Nothing is repeated by itself. Deleting a writer without Commit
// abandons what is still under way.
//
// Between Write and Commit a writer holds up to four of its client's lane's slots
// (LaneOptions::calls_max), all writers together at most half of them.
class AppendWriter {
 public:
  AppendWriter(Core* core, std::string id, uint64_t generation, Durability durability);
  ~AppendWriter();
  AppendWriter(AppendWriter&&) noexcept;
  AppendWriter& operator=(AppendWriter&&) noexcept;

  // Sends the keys and values of consecutive tokens, the first at `position`; both are
  // [token_count][kv_head_count][head_dim] in the model's cache type and are borrowed for the call.
  // Blocks while the server is behind. Errors may be those of an earlier Write: POSITION_GAP,
  // APPEND_CONFLICT, GENERATION_MISMATCH, POOL_FULL. After one the writer is of no more use.
  //
  // A stream lives for at most the admin deadline, and a long prefill is spread over several: a
  // pause of more than half of the deadline between writes can fail with DEADLINE_EXCEEDED. Commit
  // before it.
  absl::Status Write(uint32_t layer, uint32_t position, const TensorView& k, const TensorView& v,
                     const QuerySample& sample = {});

  // Waits until everything is applied. Afterwards the writer may be used again; counts go on.
  absl::StatusOr<Receipt> Commit();

 private:
  absl::Status WriteParts(uint32_t layer, uint32_t position, const TensorView& k,
                          const TensorView& v, const QuerySample& sample, const AppendCut& cut);
  absl::Status FinishStream();

  Core* core_;
  std::string id_;
  uint64_t generation_;
  Durability durability_;
  std::unique_ptr<AppendStream> stream_;
  std::chrono::steady_clock::time_point opened_;
  // Messages of the present stream.
  uint64_t sent_ = 0;
  Receipt receipt_;
  absl::Status status_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_APPEND_WRITER_H_
