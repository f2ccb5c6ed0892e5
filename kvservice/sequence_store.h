// Sequences between memory and disk: who waits for whom.
//
//            Suspend, or the pool is full
//     kMemory ──────────► kSaving ──────────► kDisk
//        ▲                  │ the disk failed    │ a call names it (Resume, if it is suspended)
//        └──────────────────┴──── kLoading ◄─────┘
//
// Bytes move in pieces, one under way per sequence, so that the executor spends about a millisecond
// on each and memory for copies is bounded. A call for a sequence that moves is parked and runs
// when it has arrived, in the order of the calls. Durable appends and cuts of sequences in memory
// are handed to the disk's thread at once, in their order, and answered when they are synced;
// nobody else waits for them.
//
// Belongs to the executor thread. Without a tier it does nothing.

#ifndef KVSERVICE_KVSERVICE_SEQUENCE_STORE_H_
#define KVSERVICE_KVSERVICE_SEQUENCE_STORE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "attention/device.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/cache/disk_tier.h"
#include "kvservice/call_queue.h"
#include "kvservice/clock.h"
#include "kvservice/disk_worker.h"
#include "kvservice/engine.h"
#include "kvservice/engine_errors.h"
#include "kvservice/evictions.h"
#include "kvservice/model_registry.h"
#include "kvservice/sequence_table.h"
#include "kvservice/store_scrub.h"
#include "kvservice/tenants.h"

namespace kvservice {

class SequenceStore : private ScrubHost {
 public:
  using StatusDone = absl::AnyInvocable<void(absl::Status)>;

  // Borrowed, but for the tier.
  struct Parts {
    const EngineOptions* options = nullptr;
    Clock* clock = nullptr;
    Device* device = nullptr;
    BlockPool* pool = nullptr;
    SequenceTable* table = nullptr;
    Tenants* tenants = nullptr;
    std::unique_ptr<DiskTier> tier;
    // Runs something on the executor thread later.
    DiskWorker::Post post;
  };
  explicit SequenceStore(Parts parts);
  ~SequenceStore() override;
  SequenceStore(const SequenceStore&) = delete;
  SequenceStore& operator=(const SequenceStore&) = delete;

  bool enabled() const { return worker_ != nullptr; }
  // Puts what the tier has into the table and its models into the registry. Before anything else.
  absl::Status Recover(ModelRegistry* registry);

  // ---- Waiting ----
  enum class Need : uint8_t {
    kSettled,   // Not on its way.
    kInMemory,  // Brought back if it is on disk and not suspended.
  };
  // Runs `task` now, or when the sequence is where it is needed, or cannot be.
  void WhenThere(Need need, std::string_view tenant, const SequenceId& id, Task task) {
    RunWhenThere(need, std::string(tenant), id, std::move(task), false);
  }
  // For calls that name several: true if the sequence has to be waited for, with Park. `is_again`
  // after a wait: what could not be loaded is then not tried once more.
  bool MustWait(Need need, std::string_view tenant, const SequenceId& id, bool is_again);
  void Park(const SequenceId& id, Task task);
  // After POOL_FULL, and TENANT_QUOTA of the pool: true if others are on their way out of memory,
  // else nothing can be done. Beyond its own maximum a tenant makes room itself.
  struct RoomAsk {
    size_t bytes = 0;
    Lack lack = Lack::kNone;
    // Whose room it is.
    BlockOwner owner = 0;
    // Stays.
    const SequenceRecord* keep = nullptr;
  };
  bool MakeRoom(const RoomAsk& ask);
  // Runs `task` after the next of them has gone, when the sequence is in memory. Calls that name
  // the sequence meanwhile stay behind it.
  void ParkForRoom(std::string_view tenant, SequenceRecord* record, Task task);
  // Keeps some of the pool free as long as there are sequences that nobody uses, and tenants below
  // their maxima.
  void KeepWatermark();

  // ---- Changes of sequences that are where they are needed ----
  // Whether an append of `token_count` to a layer could be stored now: NO_DISK_TIER, DISK_FAILED,
  // DISK_FULL, DISK_BUSY.
  absl::Status CheckDurable(const SequenceRecord& record, uint32_t layer,
                            uint64_t token_count) const;
  // Whether a small change could be written now: DISK_FAILED or DISK_BUSY.
  absl::Status CheckWritable() const;
  // `done` when everything of the layer is synced.
  void StoreLayerDurably(SequenceRecord* record, uint32_t layer, StatusDone done);
  // After a truncate, and after a change of generation.
  void StoreCut(SequenceRecord* record, uint32_t length, StatusDone done);
  void Suspend(SequenceRecord* record, StatusDone done);
  void Resume(SequenceRecord* record, StatusDone done);
  // Removes what is on disk. The record may go at once.
  void Remove(const SequenceRecord& record, StatusDone done);
  void RemoveLost(const SequenceId& id, StatusDone done);
  // For the sweep: false if it must stay a while.
  bool Expire(SequenceRecord* record);

  // ---- Looking for damage ----
  // Reads everything on disk and says what was found (store_scrub.h).
  void Verify(StoreScrub::Done done);
  // Time has passed.
  void SweepScrub();
  void StopScrub(const absl::Status& status);

  // ---- Ending ----
  // Begins to store everything that there is room for.
  void BeginDrain();
  // Answers are still to come.
  bool HasOutstanding() const { return outstanding_ > 0; }
  // After the last answer: closes the tier, and says how that went.
  absl::Status Close();

  void FillStats(EngineStats* stats) const;

 private:
  enum class Goal : uint8_t { kLayer, kEvict, kSuspend, kKeep };
  struct Saving {
    SequenceRecord* record = nullptr;
    Goal goal = Goal::kKeep;
    uint32_t layer = 0;          // of kLayer
    Evictions::Leaving leaving;  // of kEvict and kSuspend
    StatusDone done;
  };
  struct Loading {
    SequenceRecord* record = nullptr;
    bool is_resume = false;
    uint32_t attempts = 0;
    // The next slice, and the progress that replaces the record's.
    uint32_t layer = 0;
    uint32_t block = 0;
    StoredProgress progress;
    StatusDone done;
  };

  void ParkForRoom(Task task);
  void RunWhenThere(Need need, std::string tenant, const SequenceId& id, Task task, bool is_again);
  absl::Status CheckDisk(const SequenceRecord& record, uint64_t more_bytes) const;
  // Rows of a sequence that were stored, or are about to be; and those that went.
  void AddBytes(const SequenceRecord& record, uint64_t bytes);
  void SubtractBytes(const SequenceRecord& record, uint64_t bytes);
  // Rows that a sequence needs before its first slice.
  void BeginStoring(SequenceRecord* record, TierBatch* batch);
  void PutModel(const Model& model, TierBatch* batch);
  void PutTables(const Model& model, const TableVersion* version, TierBatch* batch);
  static std::string IdentityRow(const SequenceRecord& record);
  void PutState(SequenceRecord* record, bool is_suspended, TierBatch* batch);
  void Write(TierBatch batch, bool is_synced, StatusDone done);
  void RemoveRows(const SequenceId& id, StatusDone done);

  void StartSaving(SequenceRecord* record, Goal goal, uint32_t layer, StatusDone done);
  void SavePiece(std::shared_ptr<Saving> saving);
  void FinishSaving(Saving* saving, absl::Status status);
  bool EvictOne(const Evictions::Ask& ask);

  void StartLoading(SequenceRecord* record, bool is_resume, StatusDone done);
  void TakeMemory(std::shared_ptr<Loading> loading);
  void LoadPiece(std::shared_ptr<Loading> loading);
  static std::vector<SliceRange> NextRanges(const Loading& loading);
  void PasteSlices(std::shared_ptr<Loading> loading, const absl::Status& status,
                   const std::vector<ReadSlice>& slices);
  static bool FitsTheRest(const Loading& loading);
  void FinishLoading(Loading* loading, const absl::Status& status);
  void Lose(SequenceRecord* record) override;
  void Empty(SequenceRecord* record);

  std::deque<Task> TakeParked(const SequenceId& id);
  void Arrived(const SequenceId& id);
  void RoomMade();
  void DrainNext();
  Inventory InventoryNow() const;

  void ReadForScrub(absl::AnyInvocable<DiskWorker::Answer(const DiskTier& tier)> read) override;
  bool IsDiskIdle() const override { return worker_->waiting_jobs() == 0; }
  std::vector<std::string> RegistryKeys() const override;
  bool MendRegistryRow(const std::string& key) override;
  absl::Status MendRows(SequenceRecord* record) override;
  absl::Status MendSlice(SequenceRecord* record, uint32_t layer, uint32_t block) override;

  const Parts parts_;
  std::unique_ptr<DiskWorker> worker_;
  std::unique_ptr<StoreScrub> scrub_;

  // Rows of the registry that are on disk already.
  std::set<uint64_t> stored_models_;
  std::set<std::pair<uint64_t, Sha256::Digest>> stored_tables_;
  uint64_t crash_count_ = 0;

  // Of all sequences' rows, those that are still to be handed over of sequences on their way out
  // included.
  uint64_t bytes_used_ = 0;
  Evictions evictions_;
  size_t outstanding_ = 0;

  std::map<SequenceId, std::deque<Task>, ById> parked_;
  std::deque<Task> parked_for_room_;
  // In both, at most options.queue_calls_max.
  size_t parked_count_ = 0;
  uint64_t watermark_checked_ns_ = 0;

  std::deque<SequenceRecord*> to_drain_;
  // Everything that was wanted on disk is there.
  bool is_complete_ = true;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SEQUENCE_STORE_H_
