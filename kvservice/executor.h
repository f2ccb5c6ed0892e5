// Everything the engine does to sequences. One thread calls it; nothing here locks or waits.

#ifndef KVSERVICE_KVSERVICE_EXECUTOR_H_
#define KVSERVICE_KVSERVICE_EXECUTOR_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "kvservice/attend_batch.h"
#include "kvservice/auditor.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/cache/prefix_index.h"
#include "kvservice/clock.h"
#include "kvservice/declared_prompt.h"
#include "kvservice/draw_keys.h"
#include "kvservice/engine.h"
#include "kvservice/engine_errors.h"
#include "kvservice/model_registry.h"
#include "kvservice/prefix_chain.h"
#include "kvservice/random.h"
#include "kvservice/row_placement.h"
#include "kvservice/sequence_store.h"
#include "kvservice/sequence_table.h"
#include "kvservice/table_learner.h"
#include "kvservice/tenants.h"
#include "kvservice/transfer_receiver.h"

namespace kvservice {

// Random numbers that an engine takes at start.
struct EngineSecrets {
  DrawSecret draw_secret{};
  Epoch epoch{};
  uint64_t audit_seed = 0;
  PrefixSecret prefix_secret{};
};

class Executor {
 public:
  // The clock, the random numbers and the registry are borrowed; the pool is of `device`. `post`
  // runs something on the executor thread later; without a tier it is not used.
  Executor(const EngineOptions& options, const EngineSecrets& secrets,
           std::unique_ptr<Device> device, std::unique_ptr<BlockPool> pool, Clock* clock,
           Random* random, ModelRegistry* registry, std::unique_ptr<DiskTier> tier,
           DiskWorker::Post post);

  // Takes over what the tier has. Before everything else.
  absl::Status Recover() { return store_.Recover(registry_); }

  // Runs `task` now, or when the sequence is where it is needed, or cannot be.
  void WhenThere(SequenceStore::Need need, std::string_view tenant, const SequenceId& id,
                 Task task) {
    store_.WhenThere(need, tenant, id, std::move(task));
  }
  // The first sequence of an Attend that has to be waited for, if there is one; `is_again` after a
  // wait.
  std::optional<SequenceId> MustWait(const AttendCall& call, bool is_again);
  void Park(const SequenceId& id, Task task) { store_.Park(id, std::move(task)); }

  // What a Create says about its prompt: the hashing, for any thread.
  DeclaredPrompt Declare(std::string_view tenant, const CreateOptions& asked) const {
    return DeclarePrompt(options_, prefix_chains_, tenant, registry_->Find(asked.model), asked);
  }

  // As in engine.h; a sequence that is named is where it is needed. What waits for the disk, or for
  // room in the pool, answers later. Create takes the token ids from `prompt` alone.
  absl::StatusOr<SequenceInfo> Create(std::string_view tenant, const CreateOptions& asked,
                                      const DeclaredPrompt& prompt);
  struct ForkAsk {
    std::string tenant;
    SequenceId id;
    uint64_t generation = 0;
    uint32_t length = 0;
    uint32_t lease_ms = 0;
    uint32_t attempts = 0;
  };
  void Fork(ForkAsk ask, Done<SequenceInfo> done);
  void Truncate(std::string_view tenant, const SequenceId& id, uint64_t generation, uint32_t length,
                Done<SequenceInfo> done);
  absl::StatusOr<SequenceInfo> Get(std::string_view tenant, const SequenceId& id);
  void Drop(std::string_view tenant, const SequenceId& id, Done<SequenceInfo> done);
  void Suspend(std::string_view tenant, const SequenceId& id, uint64_t generation,
               Done<SequenceInfo> done);
  void Resume(std::string_view tenant, const SequenceId& id, uint64_t generation,
              Done<SequenceInfo> done);
  absl::StatusOr<SequenceInfo> RenewLease(std::string_view tenant, const SequenceId& id,
                                          uint64_t generation, uint32_t lease_ms);
  absl::StatusOr<TenantUsage> SetQuota(const std::string& tenant,
                                       const std::optional<TenantQuota>& quota);
  std::vector<TenantUsage> ListTenants(const std::string& only, std::string_view after,
                                       uint32_t limit) const;
  std::vector<SequenceInfo> List(std::string_view tenant, const SequenceId& after, uint32_t limit);
  void Append(AppendCall call, Done<AppendResult> done) {
    Append(std::move(call), 0, std::move(done));
  }
  // Attend in two halves: between them calls are on the device, and nothing else may be called but
  // these and FillStats; the same calls once MustWait has let them pass. True if some may begin.
  bool MayBeginAttend(absl::Span<AttendCall* const> calls) const;
  void BeginAttend(absl::Span<AttendCall* const> calls);
  bool has_begun_attend() const { return attend_batch_.has_begun(); }
  bool IsAttendDone() const { return attend_batch_.IsDone(); }
  void FinishAttend(AttendBatch::Answered* answered);
  void Audit(std::string_view tenant, const SequenceId& id, const AuditAsk& ask,
             Done<AuditReport> done);

  absl::StatusOr<ExplainReport> Explain(std::string_view tenant, const SequenceId& id,
                                        ExplainAsk ask);
  absl::StatusOr<BlockReport> DescribeBlock(std::string_view tenant, const SequenceId& id,
                                            const BlockAsk& ask);

  absl::StatusOr<TransferPart> Send(std::string_view tenant, const SequenceId& id,
                                    uint64_t generation, const SendAsk& ask);
  absl::Status CheckAsSent(std::string_view tenant, const SequenceId& id, std::string_view head);
  absl::StatusOr<ReceiveReply> Receive(std::string_view tenant, const TransferAttempt& attempt,
                                       const TransferPart& part);

  void VerifyStore(Done<StoreReport> done) {
    if (!store_.enabled()) return done(NoDiskTier(""));
    store_.Verify(std::move(done));
  }
  void StopScrub(const absl::Status& status) { store_.StopScrub(status); }

  // Work that can wait for everything else, in small pieces. What a piece returns, if anything, is
  // to be run once.
  bool HasBackground() const { return auditor_.HasWork() || learnings_running_ > 0; }
  absl::AnyInvocable<void()> RunBackground();
  // Nothing runs after this: answers those who wait for background work.
  void StopBackground(const absl::Status& status) { auditor_.Stop(status); }

  // Returns the blocks of some expired sequences, and those of idle ones that the pool needs.
  void Sweep();

  // The end: everything that there is room for goes to the disk, which takes as long as
  // HasOutstanding; then the tier is closed.
  bool HasOutstanding() const { return store_.HasOutstanding(); }
  void BeginDrain() { store_.BeginDrain(); }
  absl::Status CloseStore() { return store_.Close(); }

  const MassHistograms& masses() const { return masses_; }
  // The numbers that the executor keeps; the rest is left alone.
  void FillStats(EngineStats* stats) const;

 private:
  // A sequence, wherever it is, with its lease renewed; and one in memory.
  absl::StatusOr<SequenceRecord*> UseAnywhere(std::string_view tenant, const SequenceId& id);
  absl::StatusOr<SequenceRecord*> UseAnywhere(std::string_view tenant, const SequenceId& id,
                                              uint64_t generation);
  absl::StatusOr<SequenceRecord*> Use(std::string_view tenant, const SequenceId& id);
  absl::StatusOr<SequenceRecord*> Use(std::string_view tenant, const SequenceId& id,
                                      uint64_t generation);
  absl::StatusOr<SequenceRecord*> Insert(std::unique_ptr<SequenceRecord> record);
  absl::StatusOr<SequenceInfo> Repeat(SequenceRecord* record, const CreateOptions& asked,
                                      const Policy& policy, const DeclaredPrompt& prompt);
  absl::StatusOr<ReceiveReply> BeginReceive(std::string_view tenant, const TransferBegin& begin);
  absl::StatusOr<ReceiveReply> EndReceive(std::string_view tenant, const TransferAttempt& attempt,
                                          const TransferEnd& end);
  uint64_t LeaseNs(uint32_t lease_ms) const;
  SequenceInfo Describe(const SequenceRecord& record) const;

  // What a model learns tables with, from whose keys, if that has begun.
  struct Learning {
    std::unique_ptr<TableLearner> learner;
    bool runs = false;
    std::string tenant;
    SequenceId sequence;
    // Another sequence that would do.
    bool has_next = false;
    std::string next_tenant;
    SequenceId next_sequence{};
  };
  void Append(AppendCall call, uint32_t attempts, Done<AppendResult> done);
  absl::Status CheckAppend(const AppendCall& call, const SequenceRecord& record) const;
  absl::StatusOr<AppendResult> StoreInMemory(const AppendCall& call, SequenceRecord* record);
  absl::StatusOr<SequenceRecord*> ForkNow(const ForkAsk& ask);
  // True if `task` runs once others have left the pool, for calls that found it full.
  bool WaitsForRoom(const absl::Status& status, uint32_t attempts, size_t bytes,
                    std::string_view tenant, const SequenceId& id, Task* task);
  void NoteShortages(const AttendCall& call);
  void MakeRoomForAttends();
  // Answers with the sequence, if it is still there, once `status` is known.
  SequenceStore::StatusDone DescribeLater(std::string_view tenant, const SequenceId& id,
                                          Done<SequenceInfo> done);
  absl::Status CheckSample(const AppendCall& call, const ModelSpec& spec) const;
  void TakeSample(const AppendCall& call, absl::Span<const float> queries,
                  const SequenceRecord& record);
  static void KeepSeeds(const AppendCall& call, uint32_t length_before,
                        absl::Span<const float> queries, SequenceRecord* record);
  void BeginLearning(const SequenceRecord& record);
  void LearnOne();

  const EngineOptions options_;
  const DrawKeys draw_keys_;
  const PrefixChains prefix_chains_;
  Clock* const clock_;
  Random* const random_;
  ModelRegistry* const registry_;

  // In the order of their dependence: sequences go before the pool and the index of their prompts,
  // the pool before the device.
  const std::unique_ptr<Device> device_;
  const std::unique_ptr<BlockPool> pool_;
  PrefixIndex prefix_index_;
  SequenceTable table_;
  RowPlacement placement_;
  Tenants tenants_;
  SequenceStore store_;
  TransferReceiver receiver_;
  AttendStats totals_;
  MassHistograms masses_;
  Auditor auditor_;
  AttendBatch attend_batch_;
  // Rows of Attend calls that found the pool full.
  struct Shortage {
    std::string tenant;
    SequenceId sequence;
    Lack lack = Lack::kNone;
  };
  std::vector<Shortage> shortages_;
  uint64_t leases_expired_total_ = 0;
  uint64_t prefix_requested_tokens_total_ = 0;
  uint64_t prefix_matched_tokens_total_ = 0;
  // Models that learn; one that has learnt has no learner any more.
  std::map<const Model*, Learning> learnings_;
  uint32_t learnings_running_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_EXECUTOR_H_
