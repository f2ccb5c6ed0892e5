// Audits: a share of all rows is kept and, when nothing else waits, computed again with every key
// scored; so are rows that somebody asked for. One row is one unit of work, so that calls wait for
// at most one.
//
// Kept rows stay, audited or not, until newer ones need their place; what was audited goes first. A
// row whose sequence was truncated, dropped or has expired is given up and counted.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_AUDITOR_H_
#define KVSERVICE_KVSERVICE_AUDITOR_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/audit_check.h"
#include "kvservice/draw_keys.h"
#include "kvservice/engine.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

class Auditor {
 public:
  // Rows that wait for their audit, and callers that wait for answers; more are skipped or refused.
  static constexpr uint32_t kWaitingRowsMax = 64;
  static constexpr uint32_t kJobsMax = 16;

  // seed: unpredictable, so that nobody can tell which calls are checked. Borrows all pointers.
  Auditor(const EngineOptions* options, uint64_t seed, const DrawKeys* keys, Device* device,
          SequenceTable* table, MassHistograms* masses);

  // Decides for the next call, at random, whether its rows are kept.
  bool ChooseCall();
  // A row of this sequence is kept whatever ChooseCall said.
  static bool IsAsked(const SequenceRecord& record) { return record.audits_asked > 0; }
  void Keep(KeptRow row, SequenceRecord* record);

  // `ask` is checked here: INVALID_ARGUMENT / AUDIT_TOO_LARGE, NOT_FOUND / CALL_NOT_KEPT,
  // FAILED_PRECONDITION / CALL_NOT_REPLAYABLE, RESOURCE_EXHAUSTED / OVERLOADED. Answers at once
  // unless rows are to be computed again; then RunOne does, row by row.
  void Audit(SequenceRecord* record, const AuditAsk& ask, Done<AuditReport> done);

  bool HasWork() const { return !jobs_.empty() || waiting_count_ > 0; }
  // Audits one row. What is returned, if anything, tells a caller of Audit and is to be run once.
  absl::AnyInvocable<void()> RunOne(uint64_t now_ns);
  // Answers everybody who still waits.
  void Stop(const absl::Status& status);

  AuditStats stats() const;

 private:
  using RowName = std::pair<uint64_t, uint32_t>;  // Call number, index.
  // What one caller of Audit waits for.
  struct Job {
    SequenceId id;
    std::deque<RowName> rows;
    AuditFindings findings;
    AuditReport report;
    Done<AuditReport> done;
  };

  bool MakeRoom(size_t bytes);
  KeptRow* Find(const SequenceId& id, const RowName& name);
  KeptRow* OldestWaiting();
  void Erase(const KeptRow* row);
  // The sequence as the row saw it; nullptr if it has changed, and then the row is gone.
  SequenceRecord* SequenceOf(KeptRow* row, uint64_t now_ns);
  RowTruth Recompute(const KeptRow& row, const SequenceRecord& record);
  // Computes a row again and adds what that says to the totals, if it is new, and to `job`.
  void AuditRow(KeptRow* row, const SequenceRecord& record, AuditFindings* of_job);
  absl::StatusOr<AuditReport> Replay(const SequenceRecord& record, const ReplayAsk& ask);
  void Count(const SequenceRecord& record, AuditReport* report) const;

  const EngineOptions* const options_;
  const DrawKeys* const keys_;
  Device* const device_;
  SequenceTable* const table_;
  MassHistograms* const masses_;
  std::mt19937_64 random_;
  // A call is chosen when 53 random bits are below it.
  const uint64_t chosen_below_;

  // In the order of their calls.
  std::deque<std::unique_ptr<KeptRow>> kept_;
  size_t kept_bytes_ = 0;
  uint32_t waiting_count_ = 0;
  std::deque<std::unique_ptr<Job>> jobs_;
  AuditFindings findings_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_AUDITOR_H_
