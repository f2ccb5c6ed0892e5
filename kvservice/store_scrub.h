// Looks through the disk tier for damage before somebody needs what is damaged.
//
// Every row is read and checked against its own checksum and against the row that it stands on
// (stored_rows.h), sequence after sequence in the order of their ids, a piece at a time. What
// memory still has is written again; a sequence that is on disk alone and damaged is lost, and says
// so (DATA_LOSS) from then on.
//
// Two looks may be under way: one in the background, paced, which begins anew at most every hour,
// and one that somebody asked for, which takes what the disk gives.
//
// Belongs to the executor thread; rows are read on the disk's.

#ifndef KVSERVICE_KVSERVICE_STORE_SCRUB_H_
#define KVSERVICE_KVSERVICE_STORE_SCRUB_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/cache/disk_tier.h"
#include "kvservice/clock.h"
#include "kvservice/disk_worker.h"
#include "kvservice/sequence_table.h"
#include "kvservice/store_report.h"
#include "kvservice/stored_progress.h"

namespace kvservice {

// What a look needs of the store that it looks through.
class ScrubHost {
 public:
  virtual ~ScrubHost() = default;
  // `read` runs on the disk's thread; what it returns runs on the executor, before the store
  // closes.
  virtual void ReadForScrub(absl::AnyInvocable<DiskWorker::Answer(const DiskTier& tier)> read) = 0;
  // Nothing else waits for the disk.
  virtual bool IsDiskIdle() const = 0;
  // Rows of models and tables that sequences may stand on; and one of them written again, now if
  // there are such sequences, else with the next. False if it is not written now.
  virtual std::vector<std::string> RegistryKeys() const = 0;
  virtual bool MendRegistryRow(const std::string& key) = 0;
  // Writes the rows of a sequence beside its slices again. DATA_LOSS if they cannot be what they
  // were, else an error if it cannot be done now.
  virtual absl::Status MendRows(SequenceRecord* record) = 0;
  // The same for a stored slice of a sequence in memory.
  virtual absl::Status MendSlice(SequenceRecord* record, uint32_t layer, uint32_t block) = 0;
  // A sequence that is on disk.
  virtual void Lose(SequenceRecord* record) = 0;
};

class StoreScrub {
 public:
  using Done = absl::AnyInvocable<void(absl::StatusOr<StoreReport>)>;

  // Borrowed. `bytes_per_s` paces the looks in the background; 0 = there are none.
  StoreScrub(ScrubHost* host, Clock* clock, SequenceTable* table, uint64_t bytes_per_s);

  // Time has passed: the look in the background may go on.
  void Sweep();
  // Looks through everything now. RESOURCE_EXHAUSTED / VERIFY_RUNNING if one such look is under
  // way, UNAVAILABLE / DISK_FAILED if the disk does not answer.
  void Verify(Done done);
  // Looks end where they are; `status` for whoever waits.
  void Stop(const absl::Status& status);

  const ScrubStats& stats() const { return stats_; }

 private:
  enum class At : uint8_t { kIdle, kRegistry, kSequences };
  // Where a look is.
  struct Pass {
    At at = At::kIdle;
    bool is_reading = false;
    // The sequence that is being read, or the last that was.
    std::optional<SequenceId> id;
    bool in_sequence = false;
    uint32_t layer = 0;
    uint32_t block = 0;
    // Of the slice before it, where memory does not know that, and of the sequence's S row then:
    // what is on disk alone must not change while it is read.
    Checksum previous{};
    Checksum state{};
    StoreReport report;
    Done done;
  };
  // What is read of one sequence at a time, what should be there, and what is.
  struct Piece {
    SequenceId id;
    const CacheShape* shape = nullptr;
    Residence residence = Residence::kDisk;
    // Of its rows, if they are read too.
    bool has_rows = false;
    Checksum state{};
    Checksum identity{};
    uint32_t rows_damaged = 0;
    // Slices of one layer; none if the sequence has no more.
    std::optional<SliceRange> range;
    // [slices], of those that are known before they are read.
    std::vector<std::optional<Checksum>> expected;
    uint32_t whole_slices = 0;
    Checksum last{};  // of the last whole one
    uint64_t bytes = 0;
    absl::Status status;
  };

  void Begin(Pass* pass);
  // Sends the next piece on its way, or ends the look.
  void GoOn(Pass* pass);
  void ReadRegistry(Pass* pass);
  SequenceRecord* NextSequence(Pass* pass);
  void ReadPiece(Pass* pass, const SequenceRecord& record);
  static Piece PieceOf(Pass* pass, const SequenceRecord& record);
  static void PlanSlices(const LayerProgress& stored, bool is_in_memory, const Pass& pass,
                         const Checksum& seed, Piece* piece);
  static void Read(const DiskTier& tier, Piece* piece);
  void Take(Pass* pass, const Piece& piece);
  void TakeRows(Pass* pass, const Piece& piece, SequenceRecord* record);
  void TakeDamage(Pass* pass, const Piece& piece, SequenceRecord* record);
  void Lose(Pass* pass, SequenceRecord* record);
  void Leave(Pass* pass, uint64_t StoreReport::*as);
  void End(Pass* pass, const absl::Status& status);
  void Count(Pass* pass, uint64_t StoreReport::*what, uint64_t count = 1);
  void Spend(Pass* pass, uint64_t bytes);

  ScrubHost* const host_;
  Clock* const clock_;
  SequenceTable* const table_;
  const uint64_t bytes_per_s_;
  Pass background_;
  Pass asked_;
  bool is_stopped_ = false;
  // When the look in the background goes on, and when the next may begin.
  uint64_t next_piece_ns_ = 0;
  uint64_t next_pass_ns_ = 0;
  ScrubStats stats_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORE_SCRUB_H_
