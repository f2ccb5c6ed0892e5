// Everything the engine does to sequences. One thread calls it; nothing here locks or waits.

#ifndef KVSERVICE_KVSERVICE_EXECUTOR_H_
#define KVSERVICE_KVSERVICE_EXECUTOR_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "kvservice/attend_batch.h"
#include "kvservice/auditor.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/clock.h"
#include "kvservice/draw_keys.h"
#include "kvservice/engine.h"
#include "kvservice/model_registry.h"
#include "kvservice/random.h"
#include "kvservice/sequence_table.h"
#include "kvservice/table_learner.h"

namespace kvservice {

// Random numbers that an engine takes at start.
struct EngineSecrets {
  DrawSecret draw_secret{};
  Epoch epoch{};
  uint64_t audit_seed = 0;
};

class Executor {
 public:
  // The clock, the random numbers and the registry are borrowed; the pool is of `device`.
  Executor(const EngineOptions& options, const EngineSecrets& secrets,
           std::unique_ptr<Device> device, std::unique_ptr<BlockPool> pool, Clock* clock,
           Random* random, const ModelRegistry* registry);

  // As in engine.h.
  absl::StatusOr<SequenceInfo> Create(std::string_view tenant, const CreateOptions& asked);
  absl::StatusOr<SequenceInfo> Fork(std::string_view tenant, const SequenceId& id,
                                    uint64_t generation, uint32_t length, uint32_t lease_ms);
  absl::StatusOr<SequenceInfo> Truncate(std::string_view tenant, const SequenceId& id,
                                        uint64_t generation, uint32_t length);
  absl::StatusOr<SequenceInfo> Get(std::string_view tenant, const SequenceId& id);
  absl::StatusOr<SequenceInfo> Drop(std::string_view tenant, const SequenceId& id);
  absl::StatusOr<SequenceInfo> RenewLease(std::string_view tenant, const SequenceId& id,
                                          uint64_t generation, uint32_t lease_ms);
  std::vector<SequenceInfo> List(std::string_view tenant, const SequenceId& after, uint32_t limit);
  absl::StatusOr<AppendResult> Append(const AppendCall& call);
  void Attend(absl::Span<AttendCall* const> calls, absl::Span<absl::Status> statuses);
  void Audit(std::string_view tenant, const SequenceId& id, const AuditAsk& ask,
             Done<AuditReport> done);

  absl::StatusOr<ExplainReport> Explain(std::string_view tenant, const SequenceId& id,
                                        ExplainAsk ask);

  // Work that can wait for everything else, in small pieces. What a piece returns, if anything, is
  // to be run once.
  bool HasBackground() const { return auditor_.HasWork() || learnings_running_ > 0; }
  absl::AnyInvocable<void()> RunBackground();
  // Nothing runs after this: answers those who wait for background work.
  void StopBackground(const absl::Status& status) { auditor_.Stop(status); }

  // Returns the blocks of some expired sequences.
  void Sweep();

  // The numbers that the executor keeps; the rest is left alone.
  void FillStats(EngineStats* stats) const;

 private:
  // A sequence that may be used now, with its lease renewed.
  absl::StatusOr<SequenceRecord*> Use(std::string_view tenant, const SequenceId& id);
  absl::StatusOr<SequenceRecord*> Use(std::string_view tenant, const SequenceId& id,
                                      uint64_t generation);
  absl::StatusOr<SequenceRecord*> Insert(std::unique_ptr<SequenceRecord> record);
  absl::StatusOr<SequenceInfo> Repeat(SequenceRecord* record, const CreateOptions& asked,
                                      const Policy& policy);
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
  absl::Status CheckSample(const AppendCall& call, const ModelSpec& spec) const;
  void TakeSample(const AppendCall& call, absl::Span<const float> queries,
                  const SequenceRecord& record);
  static void KeepSeeds(const AppendCall& call, uint32_t length_before,
                        absl::Span<const float> queries, SequenceRecord* record);
  void BeginLearning(const SequenceRecord& record);
  void LearnOne();

  const EngineOptions options_;
  const DrawKeys draw_keys_;
  Clock* const clock_;
  Random* const random_;
  const ModelRegistry* const registry_;

  // In the order of their dependence: sequences go before the pool, the pool before the device.
  const std::unique_ptr<Device> device_;
  const std::unique_ptr<BlockPool> pool_;
  SequenceTable table_;
  AttendStats totals_;
  Auditor auditor_;
  AttendBatch attend_batch_;
  uint64_t leases_expired_total_ = 0;
  // Models that learn; one that has learnt has no learner any more.
  std::map<const Model*, Learning> learnings_;
  uint32_t learnings_running_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_EXECUTOR_H_
