#include "kvservice/auditor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

// Doubles of [0, 1) have so many bits.
constexpr int kChanceBits = 53;

uint64_t ChosenBelow(double rate) {
  return static_cast<uint64_t>(std::ldexp(std::clamp(rate, 0.0, 1.0), kChanceBits));
}

absl::Status TooLarge(const char* field, uint32_t count) {
  return InvalidField(
      field, "AUDIT_TOO_LARGE",
      absl::StrCat(field, " is ", count, ", at most ", kAuditRowsMax, " are allowed"));
}

absl::Status CheckAsk(const AuditAsk& ask) {
  if (ask.row_count > kAuditRowsMax) return TooLarge("call_count", ask.row_count);
  if (ask.keep_next > kAuditRowsMax) return TooLarge("keep_next", ask.keep_next);
  if (ask.replay.has_value() && ask.row_count > 0) {
    return InvalidField("call_count", "AUDIT_AMBIGUOUS",
                        "call_count and replay exclude each other");
  }
  return absl::OkStatus();
}

absl::Status NotKept(const char* what) {
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat(what, " is not kept"),
                   {.reason = "CALL_NOT_KEPT", .field = "replay", .metadata = {}});
}

absl::Status NotReplayable() {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   "the row's choice came from remembered lists, which have changed since",
                   {.reason = "CALL_NOT_REPLAYABLE", .field = "replay", .metadata = {}});
}

// The memory behind one row that is computed again.
struct RowMemory {
  ViewArrays view;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
};

// The kept row on its sequence, with nothing planned yet.
AttendRow RowOf(const KeptRow& row, const SequenceRecord& record, RowMemory* memory) {
  const KvLayout& layout = record.model->spec.layout;
  memory->out.resize(row.out.size());
  memory->lse.resize(row.certificates.size());
  memory->certificates.resize(row.certificates.size());
  memory->groups.resize(layout.kv_head_count);
  AttendRow planned;
  planned.view = record.cache->View(row.layer, row.length(), &memory->view);
  planned.position = row.position;
  planned.query_count = row.query_count;
  planned.q = row.q.data();
  planned.tables = record.tables->shape.TablesOf(row.layer);
  planned.out = memory->out.data();
  planned.lse = memory->lse.data();
  planned.certificates = memory->certificates.data();
  planned.groups = memory->groups.data();
  return planned;
}

// What was attended is given, and everything else is scored.
Plan ExactPlan(const KeptRow& row, std::vector<uint32_t>* positions,
               std::vector<uint32_t>* offsets) {
  offsets->assign(1, 0);
  for (const std::vector<uint32_t>& list : row.selected) {
    positions->insert(positions->end(), list.begin(), list.end());
    offsets->push_back(static_cast<uint32_t>(positions->size()));
  }
  Plan plan;
  plan.source = Source::kGiven;
  plan.sink_end = row.plan.sink_end;
  plan.local_begin = row.plan.local_begin;
  plan.given = *positions;
  plan.given_offsets = *offsets;
  plan.dense_share = 1.0F;
  plan.prove = Guarantee::kExact;
  return plan;
}

}  // namespace

Auditor::Auditor(const EngineOptions* options, uint64_t seed, const DrawKeys* keys, Device* device,
                 SequenceTable* table, MassHistograms* masses)
    : options_(options),
      keys_(keys),
      device_(device),
      table_(table),
      masses_(masses),
      random_(seed),
      chosen_below_(ChosenBelow(options->audit_rate)) {}

AuditStats Auditor::stats() const {
  AuditStats stats = findings_.stats;
  stats.rows_waiting = waiting_count_;
  return stats;
}

bool Auditor::ChooseCall() {
  if (chosen_below_ == 0) return false;
  return random_() >> (std::numeric_limits<uint64_t>::digits - kChanceBits) < chosen_below_;
}

void Auditor::Erase(const KeptRow* row) {
  kept_bytes_ -= row->bytes();
  if (!row->audited) --waiting_count_;
  std::erase_if(kept_, [row](const auto& kept) { return kept.get() == row; });
}

bool Auditor::MakeRoom(size_t bytes) {
  if (waiting_count_ >= kWaitingRowsMax || bytes > options_->audit_bytes_max) return false;
  while (kept_bytes_ + bytes > options_->audit_bytes_max ||
         kept_.size() >= options_->audit_rows_max) {
    const auto old =
        std::find_if(kept_.begin(), kept_.end(), [](const auto& kept) { return kept->audited; });
    if (old == kept_.end()) return false;
    Erase(old->get());
  }
  return true;
}

void Auditor::Keep(KeptRow row, SequenceRecord* record) {
  if (!MakeRoom(row.bytes())) {
    ++findings_.stats.rows_skipped;
    return;
  }
  if (record->audits_asked > 0) --record->audits_asked;
  kept_bytes_ += row.bytes();
  ++waiting_count_;
  kept_.push_back(std::make_unique<KeptRow>(std::move(row)));
}

KeptRow* Auditor::Find(const SequenceId& id, const RowName& name) {
  const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const auto& kept) {
    return kept->call_number == name.first && kept->index == name.second && kept->id == id;
  });
  return found == kept_.end() ? nullptr : found->get();
}

KeptRow* Auditor::OldestWaiting() {
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [](const auto& kept) { return !kept->audited; });
  return found == kept_.end() ? nullptr : found->get();
}

SequenceRecord* Auditor::SequenceOf(KeptRow* row, uint64_t now_ns) {
  SequenceRecord* record = table_->Find(row->tenant, row->id, now_ns);
  if (record != nullptr && record->generation == row->generation) return record;
  if (!row->audited) ++findings_.stats.rows_cancelled;
  Erase(row);
  return nullptr;
}

RowTruth Auditor::Recompute(const KeptRow& row, const SequenceRecord& record) {
  std::array<RowMemory, 2> memory;
  std::array<AttendRow, 2> rows = {RowOf(row, record, &memory[0]), RowOf(row, record, &memory[1])};
  std::vector<uint32_t> positions;
  std::vector<uint32_t> offsets;
  rows[0].plan = ExactPlan(row, &positions, &offsets);
  // Everything is read: the rest of a plan says nothing more.
  rows[1].plan.prove = Guarantee::kExact;
  device_->Attend(record.model->layers[row.layer], absl::MakeSpan(rows));
  return {.exact = std::move(memory[0].certificates),
          .dense = std::move(memory[1].certificates),
          .dense_out = std::move(memory[1].out)};
}

void Auditor::AuditRow(KeptRow* row, const SequenceRecord& record, AuditFindings* of_job) {
  const RowTruth truth = Recompute(*row, record);
  if (of_job != nullptr) CompareRow(*row, truth, of_job);
  if (row->audited) return;
  row->audited = true;
  --waiting_count_;
  findings_.lines.clear();
  CompareRow(*row, truth, &findings_);
  findings_.Summarize();
  for (const HeadCertificate& certificate : truth.exact) {
    masses_->AddAudited(row->selector, row->layer, certificate.dropped_mass_upper.value);
  }
  if (options_->on_audit_violation == nullptr) return;
  for (const std::string& line : findings_.lines) options_->on_audit_violation(line);
}

void Auditor::Count(const SequenceRecord& record, AuditReport* report) const {
  report->keep_next_left = record.audits_asked;
  report->kept_rows =
      static_cast<uint32_t>(std::count_if(kept_.begin(), kept_.end(), [&](const auto& kept) {
        return kept->id == record.id && kept->generation == record.generation;
      }));
}

void Auditor::Audit(SequenceRecord* record, const AuditAsk& ask, Done<AuditReport> done) {
  const absl::Status status = CheckAsk(ask);
  if (!status.ok()) return done(status);
  if (ask.keep_next > 0) record->audits_asked = ask.keep_next;
  if (ask.replay.has_value()) return done(Replay(*record, *ask.replay));
  auto job = std::make_unique<Job>();
  job->id = record->id;
  Count(*record, &job->report);
  for (auto kept = kept_.rbegin(); kept != kept_.rend() && job->rows.size() < ask.row_count;
       ++kept) {
    const KeptRow& row = **kept;
    if (row.id != record->id || row.generation != record->generation) continue;
    job->rows.emplace_back(row.call_number, row.index);
    job->report.call_numbers.push_back(row.call_number);
  }
  if (job->rows.empty()) return done(std::move(job->report));
  if (jobs_.size() >= kJobsMax) return done(Overloaded(kJobsMax));
  job->done = std::move(done);
  jobs_.push_back(std::move(job));
}

absl::StatusOr<AuditReport> Auditor::Replay(const SequenceRecord& record, const ReplayAsk& ask) {
  if (ask.epoch != keys_->epoch() || ask.draw_secret_id != keys_->secret_id()) {
    return NotKept("a call of another epoch or under another secret");
  }
  const KeptRow* row = Find(record.id, {ask.call_number, ask.row});
  if (row == nullptr || row->generation != record.generation) return NotKept("this row");
  if (row->used_lists) return NotReplayable();
  RowMemory memory;
  AttendRow again = RowOf(*row, record, &memory);
  again.plan = row->plan;
  again.plan.given = row->given;
  again.plan.given_offsets = row->given_offsets;
  again.draw_key = keys_->KeyOf(row->call_number, row->index, row->id.bytes, row->layer);
  device_->Attend(record.model->layers[row->layer], absl::MakeSpan(&again, 1));
  AuditReport report;
  Count(record, &report);
  report.call_numbers = {row->call_number};
  const size_t head_count = record.model->spec.layout.query_head_count;
  const size_t group_size = record.model->spec.layout.group_size();
  for (size_t i = 0; i < memory.certificates.size(); ++i) {
    if (row->dense_by_memory[i % head_count / group_size]) {
      memory.certificates[i] = row->certificates[i];
    }
  }
  report.replay_equal = SameCertificates(row->certificates, memory.certificates);
  report.replayed = std::move(memory.certificates);
  return report;
}

absl::AnyInvocable<void()> Auditor::RunOne(uint64_t now_ns) {
  if (jobs_.empty()) {
    KeptRow* row = OldestWaiting();
    SequenceRecord* record = row == nullptr ? nullptr : SequenceOf(row, now_ns);
    if (record != nullptr) AuditRow(row, *record, nullptr);
    return nullptr;
  }
  Job* job = jobs_.front().get();
  KeptRow* row = Find(job->id, job->rows.front());
  job->rows.pop_front();
  SequenceRecord* record = row == nullptr ? nullptr : SequenceOf(row, now_ns);
  if (record == nullptr) {
    ++job->findings.stats.rows_cancelled;
  } else {
    AuditRow(row, *record, &job->findings);
  }
  if (!job->rows.empty()) return nullptr;
  job->findings.Summarize();
  job->report.stats = job->findings.stats;
  job->report.violations = std::move(job->findings.lines);
  std::unique_ptr<Job> finished = std::move(jobs_.front());
  jobs_.pop_front();
  return [finished = std::move(finished)] { finished->done(std::move(finished->report)); };
}

void Auditor::Stop(const absl::Status& status) {
  for (const std::unique_ptr<Job>& job : jobs_) job->done(status);
  jobs_.clear();
}

}  // namespace kvservice
