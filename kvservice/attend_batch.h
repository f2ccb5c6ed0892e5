// Runs waiting Attend calls of one layer: checks every row, stores its k and v, plans it, and
// executes all rows of one model in one device batch.
//
// Rows fail on their own. A row is checked completely before anything of it is stored; after that
// only the device can fail it (a bound that was not met), and then what was stored stays: repeating
// the call stores nothing twice.
//
// Calls may begin while those before them are on the device, if they are of other sequences.
//
// Belongs to the executor thread, which reuses one object so that steady state allocates little.

#ifndef KVSERVICE_KVSERVICE_ATTEND_BATCH_H_
#define KVSERVICE_KVSERVICE_ATTEND_BATCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "kvservice/auditor.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/draw_keys.h"
#include "kvservice/engine.h"
#include "kvservice/seed_queries.h"
#include "kvservice/sequence_table.h"
#include "kvservice/tensor_copies.h"
#include "selector/selector.h"

namespace kvservice {

class AttendBatch {
 public:
  // What it works with; borrowed, outlives the object.
  struct Parts {
    const EngineOptions* options = nullptr;
    Device* device = nullptr;
    const BlockPool* pool = nullptr;
    SequenceTable* table = nullptr;
    AttendStats* totals = nullptr;
    MassHistograms* masses = nullptr;
    const DrawKeys* draw_keys = nullptr;
    Auditor* auditor = nullptr;
  };
  explicit AttendBatch(const Parts& parts);

  // True if these calls may begin: there is room on the device, and no sequence of theirs is on it.
  bool MayBegin(absl::Span<AttendCall* const> calls, uint64_t now_ns) const;
  // All calls are of one layer and together have at most rows_max rows (a single call may have
  // more: it is refused). They are borrowed until Finish has returned them.
  void Begin(absl::Span<AttendCall* const> calls, uint64_t now_ns);
  // Calls whose outputs are filled, and how each ended.
  struct Answered {
    std::vector<AttendCall*> calls;
    std::vector<absl::Status> statuses;
  };
  // Ends what began first.
  void Finish(Answered* answered);
  bool has_begun() const { return begun_ > finished_; }
  // True when Finish would not wait for the device.
  bool IsDone() const;
  // For what draws random numbers without being a call.
  uint64_t NextCallNumber() { return ++call_number_; }

 private:
  // One row that passed its checks and waits for the device.
  struct Row {
    AttendCall* call = nullptr;
    uint32_t index = 0;
    SequenceRecord* record = nullptr;
    const Policy* policy = nullptr;
    // Index of the row's first query token in the call's tensors.
    uint64_t first_token = 0;
    bool is_finite = false;
    // Its answer is kept for audits.
    bool kept = false;
  };
  // Memory behind one AttendRow of a device batch.
  struct Buffers {
    std::vector<float> q;
    // Of a row that is kept and whose outputs go to a place of the caller's.
    std::vector<float> out;
    // Of a row that is kept and whose caller did not ask for it.
    std::vector<std::vector<uint32_t>> selected;
  };
  // Calls on their way, from Begin to Finish.
  struct Flight {
    Answered calls;
    // Rows of the batch that is on the device, and those that wait for it.
    std::vector<Row> batch;
    std::vector<Row> waiting;
    std::vector<PlannedStep> steps;
    std::vector<AttendRow> planned;
    std::vector<Buffers> buffers;
    TensorCopies copies;
    std::vector<uint8_t> is_answered;  // [row of the batch]
  };

  absl::Status CheckCall(AttendCall* call, uint64_t now_ns);
  absl::Status CheckTensors(const AttendCall& call) const;
  void PrepareRows(AttendCall* call, uint64_t now_ns, Flight* flight);
  absl::Status PrepareRow(uint64_t now_ns, Row* row);
  absl::Status CheckRowPolicy(const std::string& field, Row* row) const;
  absl::Status CheckRowFinite(const Row& row) const;
  absl::Status StoreRow(const std::string& field, const Row& row);
  // Moves rows of one model and of different sequences from `waiting` to `batch`.
  void TakeBatch(Flight* flight);
  // Plans the batch. What its rows ask is remembered once the device has it.
  void PlanBatch(Flight* flight);
  void RememberBatch(const Flight& flight) const;
  void FinishBatch(Flight* flight);
  static const LayerShape& ShapeOf(const Flight& flight);
  Flight* FlightOf(uint64_t number) { return &flights_[number % flights_.size()]; }
  StepContext Context(const Row& row) const;
  PlannedStep Plan(const Row& row) const;
  // Any thread, one per row.
  void PlanRow(const Row& row, const PlannedStep& step, Buffers* buffers, AttendRow* planned) const;
  void SeedRow(const Row& row, const AttendRow& planned);
  void KeepRow(const Row& row, const AttendRow& done);
  void RememberQuery(const Row& row, const AttendRow& planned) const;
  static void FinishAssumed(const LayerShape& shape, const AttendRow& done,
                            AttendRowResult* result);
  // What becomes of the device's answer to a row; false if the row failed.
  bool SettleRow(const Row& row, const AttendRow& done);
  // What is said about it, to the caller too; any thread, one per row.
  void DescribeRow(const Row& row, const AttendRow& done, AttendStats* stats) const;

  const Parts parts_;

  // Numbers of calls start at 1 and never repeat: random numbers are drawn under them.
  uint64_t call_number_ = 0;
  uint64_t batch_number_ = 0;

  // Of the call that is being prepared: [rows], nullptr where the handle was not found.
  std::vector<SequenceRecord*> records_;
  const Model* model_ = nullptr;
  // Keys and values of its rows on their way to the device.
  PendingWrites writes_;

  // As many as the device takes, in turns.
  std::vector<Flight> flights_;
  uint64_t begun_ = 0;
  uint64_t finished_ = 0;
  std::vector<Row> later_;
  std::vector<AttendStats> row_stats_;  // [row of the batch that is finished]
  SeedScratch seed_scratch_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ATTEND_BATCH_H_
