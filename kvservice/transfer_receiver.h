// The target's side of transfers (kvservice/transfer.h): sequences that are not there yet. Their
// blocks are taken when they begin, all or none, and every slice is checked when it comes; nobody
// can name such a sequence before it is whole. One that nobody sends to any more is forgotten after
// options.receive_idle_ms; until then another attempt goes on where the one before it stopped.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_TRANSFER_RECEIVER_H_
#define KVSERVICE_KVSERVICE_TRANSFER_RECEIVER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/clock.h"
#include "kvservice/engine.h"
#include "kvservice/model_registry.h"
#include "kvservice/sequence_store.h"
#include "kvservice/sequence_table.h"
#include "kvservice/transfer.h"

namespace kvservice {

class TransferReceiver {
 public:
  // Borrowed.
  struct Parts {
    const EngineOptions* options = nullptr;
    Clock* clock = nullptr;
    Device* device = nullptr;
    BlockPool* pool = nullptr;
    const SequenceTable* table = nullptr;
    SequenceStore* store = nullptr;
    const ModelRegistry* registry = nullptr;
  };
  explicit TransferReceiver(const Parts& parts) : parts_(parts) {}
  TransferReceiver(const TransferReceiver&) = delete;
  TransferReceiver& operator=(const TransferReceiver&) = delete;

  // The errors of Engine::Receive. An attempt takes over from the one before it.
  absl::StatusOr<ReceiveReply> Begin(std::string_view tenant, const TransferBegin& begin);
  absl::StatusOr<ReceiveReply> Take(std::string_view tenant, const TransferAttempt& attempt,
                                    const TransferTables& tables);
  absl::StatusOr<ReceiveReply> Take(std::string_view tenant, const TransferAttempt& attempt,
                                    const TransferSlices& slices);
  absl::StatusOr<ReceiveReply> Take(std::string_view tenant, const TransferAttempt& attempt,
                                    const TransferSeeds& seeds);
  // The sequence, without its id and lease, once it is whole. Nothing of the transfer is left then.
  absl::StatusOr<std::unique_ptr<SequenceRecord>> End(std::string_view tenant,
                                                      const TransferAttempt& attempt);
  // Harmless if there is no such transfer.
  void Forget(std::string_view tenant, const TransferAttempt& attempt);
  // Forgets those that nobody sends to.
  void Sweep();

  // What a sequence that came by a transfer has as its request id: longer than a caller's may be.
  static std::string RequestIdOf(const Sha256::Digest& name);

 private:
  struct Arriving {
    TransferHead head;
    Checksum seed{};
    uint64_t attempt = 0;
    uint64_t used_ns = 0;
    // Without a cache until the tables are there.
    std::unique_ptr<SequenceRecord> record;
    // [layer_count]
    std::vector<LayerReceived> layers;
  };
  using Key = std::pair<std::string, Sha256::Digest>;

  absl::StatusOr<TransferHead> CheckHead(std::string_view tenant, const TransferBegin& begin,
                                         const Model** model) const;
  absl::StatusOr<Arriving*> Find(std::string_view tenant, const TransferAttempt& attempt);
  absl::Status TakeMemory(Arriving* arriving);
  absl::Status CheckSlices(const Arriving& arriving, const TransferSlices& slices) const;
  // Whether what was pasted has the records that the source has.
  absl::Status Verify(const Arriving& arriving, const TransferSlices& slices);
  ReceiveReply ReplyOf(const Sha256::Digest& name, const Arriving& arriving) const;

  const Parts parts_;
  std::map<Key, Arriving> arriving_;
  uint64_t attempts_ = 0;
  // One slice with its sketch, reused.
  std::string scratch_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TRANSFER_RECEIVER_H_
