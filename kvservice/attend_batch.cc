#include "kvservice/attend_batch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "kvservice/bound_not_met.h"
#include "kvservice/deferred_exact.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/row_check.h"
#include "kvservice/store_rows.h"
#include "kvservice/tensor_check.h"
#include "selector/assumed.h"
#include "selector/selector.h"

namespace kvservice {
namespace {

uint64_t QueryTokens(const AttendCall& call) {
  uint64_t count = 0;
  for (const AttendCallRow& row : call.rows) count += row.query_count;
  return count;
}

// Elements of q and out per query token. The tensor's shape was checked.
size_t TokenFloats(const AttendCall& call) {
  return static_cast<size_t>(call.q.shape[1]) * static_cast<size_t>(call.q.shape[2]);
}

size_t TokenHeads(const AttendCall& call) { return static_cast<size_t>(call.q.shape[1]); }

void SizeOutputs(AttendCall* call) {
  const uint64_t token_count = QueryTokens(*call);
  const size_t floats = token_count * TokenFloats(*call);
  if (call->out_place.size() != floats) call->out_place = {};
  call->out.resize(call->out_place.empty() ? floats : 0);
  call->lse.resize(token_count * TokenHeads(*call));
  call->results.resize(call->rows.size());
  // The caller may have used them for a call before.
  for (AttendRowResult& result : call->results) {
    result.selected.clear();
    result.deferred.clear();
  }
}

// Of the call's tokens from this one on.
float* OutputsFrom(AttendCall* call, uint64_t first_token) {
  float* const outputs = call->out_place.empty() ? call->out.data() : call->out_place.data();
  return outputs + first_token * TokenFloats(*call);
}

void FailRow(AttendCall* call, uint32_t index, uint64_t first_token, absl::Status status) {
  const uint64_t count = call->rows[index].query_count;
  std::fill_n(OutputsFrom(call, first_token), count * TokenFloats(*call), 0.0F);
  std::fill_n(call->lse.begin() + static_cast<ptrdiff_t>(first_token * TokenHeads(*call)),
              count * TokenHeads(*call), 0.0F);
  call->results[index] = AttendRowResult();
  call->results[index].status = std::move(status);
}

// The row's queries as floats: in place where they are floats already, else widened into `widened`.
const float* Queries(const TensorView& q, size_t first, size_t count, std::vector<float>* widened) {
  const std::byte* data = q.bytes.data() + first * ElementBytes(q.dtype);
  if (q.dtype == DType::kFloat32 && reinterpret_cast<uintptr_t>(data) % alignof(float) == 0) {
    return reinterpret_cast<const float*>(data);
  }
  widened->resize(count);
  for (size_t i = 0; i < count; ++i) (*widened)[i] = LoadElement(q.dtype, data, i);
  return widened->data();
}

}  // namespace

AttendBatch::AttendBatch(const Parts& parts)
    : parts_(parts), flights_(std::max(1U, parts.device->calls_max())) {}

bool AttendBatch::MayBegin(absl::Span<AttendCall* const> calls, uint64_t now_ns) const {
  if (!has_begun()) return true;
  if (begun_ - finished_ >= flights_.size()) return false;
  for (const AttendCall* call : calls) {
    for (const AttendCallRow& row : call->rows) {
      const SequenceRecord* record = parts_.table->Find(call->tenant, row.id, now_ns);
      if (record != nullptr && record->rows_begun > 0) return false;
    }
  }
  return true;
}

void AttendBatch::Begin(absl::Span<AttendCall* const> calls, uint64_t now_ns) {
  Flight* const flight = FlightOf(begun_++);
  flight->calls.calls.assign(calls.begin(), calls.end());
  flight->calls.statuses.clear();
  flight->waiting.clear();
  flight->batch.clear();
  flight->copies.Begin(calls);
  for (AttendCall* call : calls) {
    call->call_number = NextCallNumber();
    call->epoch = parts_.draw_keys->epoch();
    call->draw_secret_id = parts_.draw_keys->secret_id();
    call->started_ns = now_ns;
    flight->calls.statuses.push_back(CheckCall(call, now_ns));
    if (flight->calls.statuses.back().ok()) PrepareRows(call, now_ns, flight);
  }
  for (const Row& row : flight->waiting) ++row.record->rows_begun;
  if (flight->waiting.empty()) return;
  TakeBatch(flight);
  PlanBatch(flight);
  parts_.device->Begin(ShapeOf(*flight), absl::MakeSpan(flight->planned));
  RememberBatch(*flight);
}

bool AttendBatch::IsDone() const {
  return flights_[finished_ % flights_.size()].batch.empty() || parts_.device->IsDone();
}

void AttendBatch::Finish(Answered* answered) {
  Flight* const flight = FlightOf(finished_++);
  if (!flight->batch.empty()) {
    parts_.device->Finish();
    FinishBatch(flight);
  }
  while (!flight->waiting.empty()) {
    TakeBatch(flight);
    PlanBatch(flight);
    parts_.device->Attend(ShapeOf(*flight), absl::MakeSpan(flight->planned));
    RememberBatch(*flight);
    FinishBatch(flight);
  }
  std::swap(*answered, flight->calls);
}

absl::Status AttendBatch::CheckCall(AttendCall* call, uint64_t now_ns) {
  if (call->rows.empty() || call->rows.size() > parts_.options->rows_max) {
    return InvalidField("rows", "ROW_COUNT_OUT_OF_RANGE",
                        absl::StrCat("a call has 1 to ", parts_.options->rows_max,
                                     " rows, this one ", call->rows.size()));
  }
  model_ = nullptr;
  records_.clear();
  for (const AttendCallRow& row : call->rows) {
    SequenceRecord* record = parts_.table->Find(call->tenant, row.id, now_ns);
    records_.push_back(record);
    if (model_ == nullptr && record != nullptr) model_ = record->model;
  }
  if (model_ != nullptr && call->layer >= model_->spec.layer_count) {
    return LayerOutOfRange(call->layer, model_->spec.layer_count);
  }
  const absl::Status status = CheckTensors(*call);
  if (!status.ok() || call->policy == nullptr || model_ == nullptr) return status;
  return CheckPolicy("", *call->policy, model_->spec);
}

// Without a model (no handle of the call was found) tensors need only agree with themselves.
absl::Status AttendBatch::CheckTensors(const AttendCall& call) const {
  const auto token_count = static_cast<int64_t>(QueryTokens(call));
  TensorExpectation of_q;
  TensorExpectation of_kv;
  of_q.shape[0] = of_kv.shape[0] = token_count;
  if (model_ != nullptr) {
    const KvLayout& layout = model_->spec.layout;
    of_q.shape = {token_count, layout.query_head_count, layout.head_dim};
    of_kv.shape = {token_count, layout.kv_head_count, layout.head_dim};
    of_kv.dtype = layout.dtype;
  }
  absl::Status status = CheckTensor(call.q, of_q);
  if (!status.ok()) return status;
  if (call.k.has_value() != call.v.has_value()) {
    const char* missing = call.k.has_value() ? "v" : "k";
    return InvalidField(missing, "TENSOR_MISSING", "k and v come together or not at all");
  }
  if (call.k.has_value()) status = CheckTensor(*call.k, of_kv);
  if (call.v.has_value() && status.ok()) status = CheckTensor(*call.v, of_kv);
  return status;
}

void AttendBatch::PrepareRows(AttendCall* call, uint64_t now_ns, Flight* flight) {
  SizeOutputs(call);
  flight->copies.Take(call, parts_.device);
  const bool audited = parts_.auditor->ChooseCall();
  uint64_t first_token = 0;
  for (uint32_t i = 0; i < call->rows.size(); ++i) {
    Row row{.call = call,
            .index = i,
            .record = records_[i],
            .first_token = first_token,
            .is_finite = flight->copies.is_finite(i)};
    absl::Status status = PrepareRow(now_ns, &row);
    if (status.ok()) {
      row.kept = audited || Auditor::IsAsked(*row.record);
      flight->waiting.push_back(row);
    } else {
      FailRow(call, i, first_token, std::move(status));
      if (call->row_done != nullptr) call->row_done(i);
    }
    first_token += call->rows[i].query_count;
  }
  if (model_ != nullptr) writes_.Run(model_->spec.layout, parts_.device);
}

absl::Status AttendBatch::PrepareRow(uint64_t now_ns, Row* row) {
  const AttendCallRow& asked = row->call->rows[row->index];
  const std::string field = absl::StrCat("rows[", row->index, "].");
  SequenceRecord* record = row->record;
  if (record == nullptr) return parts_.table->WhyAbsent(row->call->tenant, asked.id, now_ns);
  if (record->generation != asked.generation) {
    return GenerationMismatch(field + "handle.generation", asked.generation, record->generation);
  }
  SequenceTable::Renew(record, now_ns);
  if (record->model != model_) {
    return InvalidField(field + "handle", "MODEL_MISMATCH",
                        "all rows of a call are of sequences of one model");
  }
  const bool seen = std::exchange(record->last_call, call_number_) == call_number_;
  absl::Status status = CheckRow(*row->call, row->index, seen);
  if (status.ok()) status = CheckRowPolicy(field, row);
  if (status.ok()) status = CheckRowFinite(*row);
  return status.ok() ? StoreRow(field, *row) : status;
}

// Decides which policy rules the row: its own, the call's (checked with the call), the sequence's.
absl::Status AttendBatch::CheckRowPolicy(const std::string& field, Row* row) const {
  const AttendCallRow& asked = row->call->rows[row->index];
  row->policy = row->call->policy != nullptr ? row->call->policy : &row->record->policy;
  if (asked.policy != nullptr) {
    row->policy = asked.policy;
    const absl::Status status = CheckPolicy(field, *asked.policy, model_->spec);
    if (!status.ok()) return status;
  }
  if (ResolveSelector(*row->policy, Context(*row)) != SelectorKind::kGiven) return absl::OkStatus();
  return CheckGiven(field, asked, model_->spec.layout.kv_head_count,
                    static_cast<uint64_t>(asked.position) + asked.query_count);
}

absl::Status AttendBatch::CheckRowFinite(const Row& row) const {
  if (row.is_finite) return absl::OkStatus();
  // Which element is not.
  const AttendCall& call = *row.call;
  const KvLayout& layout = model_->spec.layout;
  const uint32_t token_count = call.rows[row.index].query_count;
  const size_t q_floats = TokenFloats(call);
  absl::Status status = CheckFinite(call.q, row.first_token * q_floats, token_count * q_floats);
  if (!status.ok() || !call.k.has_value()) return status;
  const size_t kv_elements = static_cast<size_t>(layout.kv_head_count) * layout.head_dim;
  const size_t first = row.first_token * kv_elements;
  status = CheckFinite(*call.k, first, token_count * kv_elements);
  return status.ok() ? CheckFinite(*call.v, first, token_count * kv_elements) : status;
}

absl::Status AttendBatch::StoreRow(const std::string& field, const Row& row) {
  const AttendCall& call = *row.call;
  const AttendCallRow& asked = call.rows[row.index];
  Sequence* cache = row.record->cache.get();
  if (call.k.has_value()) {
    const KvLayout& layout = model_->spec.layout;
    const size_t skipped_bytes =
        row.first_token * layout.kv_head_count * static_cast<size_t>(layout.vector_bytes());
    const absl::StatusOr<AppendResult> stored =
        StoreRows(*parts_.options, *parts_.pool, field,
                  {.layer = call.layer,
                   .position = asked.position,
                   .count = asked.query_count,
                   .k = call.k->bytes.data() + skipped_bytes,
                   .v = call.v->bytes.data() + skipped_bytes},
                  cache, &writes_);
    if (!stored.ok()) return stored.status();
    // Nobody can begin with it before the device has run the writes.
    row.record->OfferPrefix();
  }
  const uint32_t length = cache->length(call.layer);
  const uint64_t end = static_cast<uint64_t>(asked.position) + asked.query_count;
  if (end > length) return PositionGap(field + "position", end - 1, length);
  return absl::OkStatus();
}

// A sequence that comes twice goes to another batch: a device changes its lists while it works.
void AttendBatch::TakeBatch(Flight* flight) {
  ++batch_number_;
  flight->batch.clear();
  later_.clear();
  const Model* model = flight->waiting.front().record->model;
  for (const Row& row : flight->waiting) {
    const bool fits = row.record->model == model &&
                      std::exchange(row.record->last_batch, batch_number_) != batch_number_;
    (fits ? flight->batch : later_).push_back(row);
  }
  flight->waiting.swap(later_);
}

const LayerShape& AttendBatch::ShapeOf(const Flight& flight) {
  const Row& row = flight.batch.front();
  return row.record->model->layers[row.call->layer];
}

void AttendBatch::PlanBatch(Flight* flight) {
  const auto count = static_cast<uint32_t>(flight->batch.size());
  flight->planned.resize(count);
  if (flight->buffers.size() < count) flight->buffers.resize(count);
  flight->steps.clear();
  // Here, as forks share lists until one of them changes its own.
  for (const Row& row : flight->batch) flight->steps.push_back(Plan(row));
  parts_.device->ParallelFor(count, [this, flight](uint32_t i) {
    PlanRow(flight->batch[i], flight->steps[i], &flight->buffers[i], &flight->planned[i]);
  });
  for (uint32_t i = 0; i < count; ++i) SeedRow(flight->batch[i], flight->planned[i]);
}

void AttendBatch::RememberBatch(const Flight& flight) const {
  parts_.device->ParallelFor(
      static_cast<uint32_t>(flight.batch.size()),
      [this, &flight](uint32_t i) { RememberQuery(flight.batch[i], flight.planned[i]); });
}

void AttendBatch::FinishBatch(Flight* flight) {
  const auto count = static_cast<uint32_t>(flight->batch.size());
  row_stats_.assign(count, AttendStats());
  std::vector<uint8_t>& is_answered = flight->is_answered;
  is_answered.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    is_answered[i] = SettleRow(flight->batch[i], flight->planned[i]) ? 1 : 0;
    --flight->batch[i].record->rows_begun;
  }
  parts_.device->ParallelFor(count, [&](uint32_t i) {
    const Row& row = flight->batch[i];
    if (is_answered[i] != 0) DescribeRow(row, flight->planned[i], &row_stats_[i]);
    if (row.call->row_done != nullptr) row.call->row_done(row.index);
  });
  for (uint32_t i = 0; i < count; ++i) {
    if (is_answered[i] == 0) continue;
    const Row& row = flight->batch[i];
    for (AttendStats* const sums : {&row.record->stats, parts_.totals}) {
      AddStats(row_stats_[i], sums);
    }
    parts_.masses->AddCertified(row.call->results[row.index].selector, row.call->layer,
                                row_stats_[i]);
  }
}

void AttendBatch::SeedRow(const Row& row, const AttendRow& planned) {
  const CisParameters& cis = row.policy->cis;
  if (planned.plan.source != Source::kReuse || !cis.seed || cis.block_steps > 0) return;
  const uint32_t layer = row.call->layer;
  const uint32_t scan_count = SeedAnchors(row.record->model->layers[layer], layer, planned,
                                          &row.record->seeds, parts_.device, &seed_scratch_);
  row.record->stats.anchor_seed_scans += scan_count;
  parts_.totals->anchor_seed_scans += scan_count;
}

StepContext AttendBatch::Context(const Row& row) const {
  const AttendCallRow& asked = row.call->rows[row.index];
  const Model& model = *row.record->model;
  return {.layer = row.call->layer,
          .layer_count = model.spec.layer_count,
          .attended_length = asked.position + asked.query_count,
          .query_count = asked.query_count,
          .certified_from_tokens = parts_.device->certified_from_tokens(),
          .sliding_window = model.layers[row.call->layer].sliding_window,
          .given = asked.given,
          .given_offsets = asked.given_offsets};
}

PlannedStep AttendBatch::Plan(const Row& row) const {
  StepContext context = Context(row);
  Sequence* cache = row.record->cache.get();
  const uint32_t length = context.attended_length;
  const uint32_t anchors_max = row.policy->cis.anchors_max;
  if (UsesLists(ResolveSelector(*row.policy, context))) {
    context.lists = cache->ListsFor(context.layer, length, anchors_max);
    context.shallower_lists = cache->ShallowerLists(context.layer, length);
  }
  PlannedStep step = MakePlan(*row.policy, context);
  if (step.drop_lists) {
    cache->DropLists(context.layer);
    step.plan.lists = cache->ListsFor(context.layer, length, anchors_max);
  }
  return step;
}

void AttendBatch::PlanRow(const Row& row, const PlannedStep& step, Buffers* buffers,
                          AttendRow* planned) const {
  AttendCall* call = row.call;
  const AttendCallRow& asked = call->rows[row.index];
  const KvLayout& layout = row.record->model->spec.layout;

  AttendRowResult& result = call->results[row.index];
  result.attended_length = asked.position + asked.query_count;
  result.selector = step.selector;
  result.groups.assign(layout.kv_head_count, GroupReport());
  result.assumed.assign(layout.kv_head_count,
                        {.psaw_dropped = static_cast<float>(step.assumed_psaw_dropped_mass),
                         .etf_excess = static_cast<float>(step.assumed_etf_excess_mass)});
  result.certificates.assign(static_cast<size_t>(asked.query_count) * layout.query_head_count,
                             HeadCertificate());

  const size_t q_floats = TokenFloats(*call);
  *planned = AttendRow();
  planned->view = row.record->cache->View(call->layer, result.attended_length);
  planned->position = asked.position;
  planned->query_count = asked.query_count;
  planned->q =
      Queries(call->q, row.first_token * q_floats, asked.query_count * q_floats, &buffers->q);
  planned->plan = step.plan;
  planned->tables = row.record->tables->shape.TablesOf(call->layer);
  planned->out = OutputsFrom(call, row.first_token);
  if (row.kept && !call->out_place.empty()) {
    buffers->out.resize(asked.query_count * q_floats);
    planned->out = buffers->out.data();
  }
  planned->lse = call->lse.data() + row.first_token * TokenHeads(*call);
  planned->certificates = result.certificates.data();
  planned->groups = result.groups.data();
  if (step.plan.prove == Guarantee::kConfidence) {
    planned->draw_key =
        parts_.draw_keys->KeyOf(call->call_number, row.index, row.record->id.bytes, call->layer);
  }
  std::vector<std::vector<uint32_t>>& selected =
      call->want_selected ? result.selected : buffers->selected;
  const bool is_needed = call->want_selected || row.kept ||
                         (row.policy->deferred_exact_steps > 0 && NeedsSelection(step.plan));
  selected.assign(is_needed ? layout.kv_head_count : 0, {});
  planned->selected = selected.empty() ? nullptr : selected.data();
}

void AttendBatch::KeepRow(const Row& row, const AttendRow& done) {
  const AttendCallRow& asked = row.call->rows[row.index];
  const size_t head_count = TokenHeads(*row.call);
  const size_t floats = done.query_count * TokenFloats(*row.call);
  KeptRow kept{
      .call_number = row.call->call_number,
      .index = row.index,
      .tenant = row.record->tenant,
      .id = row.record->id,
      .generation = row.record->generation,
      .layer = row.call->layer,
      .position = done.position,
      .query_count = done.query_count,
      .selector = row.call->results[row.index].selector,
      .plan = done.plan,
      .given = {asked.given.begin(), asked.given.end()},
      .given_offsets = {asked.given_offsets.begin(), asked.given_offsets.end()},
      .used_lists = done.plan.source == Source::kReuse || done.plan.frozen_lists != nullptr,
      .q = {done.q, done.q + floats},
      .out = {done.out, done.out + floats},
      .certificates = {done.certificates, done.certificates + done.query_count * head_count},
      .selected = {done.selected, done.selected + row.record->model->spec.layout.kv_head_count}};
  for (uint32_t head = 0; head < kept.selected.size(); ++head) {
    const GroupReport& group = done.groups[head];
    kept.dense_by_memory.push_back(done.plan.source == Source::kScan &&
                                   done.plan.lists != nullptr && !group.scanned &&
                                   group.action == Action::kDense);
  }
  // What these point to does not outlive the call.
  kept.plan.lists = nullptr;
  kept.plan.frozen_lists = nullptr;
  kept.plan.given = {};
  kept.plan.given_offsets = {};
  kept.plan.min_cosines = {};
  parts_.auditor->Keep(std::move(kept), row.record);
}

// The place of an earlier query of the layer is used again; without room the query is forgotten.
// Remembered is what was asked, whether or not it could be answered.
void AttendBatch::RememberQuery(const Row& row, const AttendRow& planned) const {
  SequenceRecord* record = row.record;
  const size_t floats = planned.query_count * TokenFloats(*row.call);
  if (record->last_queries.empty()) {
    if (parts_.options->query_bytes_per_sequence_max == 0) return;
    record->last_queries.resize(record->model->spec.layer_count);
  }
  LastQuery* last = &record->last_queries[row.call->layer];
  const size_t others_bytes = record->last_query_bytes - last->q.size() * sizeof(float);
  const bool fits =
      others_bytes + floats * sizeof(float) <= parts_.options->query_bytes_per_sequence_max;
  last->position = planned.position;
  last->query_count = planned.query_count;
  last->q.assign(planned.q, planned.q + (fits ? floats : 0));
  record->last_query_bytes = others_bytes + last->q.size() * sizeof(float);
}

// Completes what the plan assumed with what the device has measured. A KV head that was answered
// densely after all dropped nothing, so there is nothing to say about it.
void AttendBatch::FinishAssumed(const LayerShape& shape, const AttendRow& done,
                                AttendRowResult* result) {
  for (size_t head = 0; head < result->groups.size(); ++head) {
    const GroupReport& group = result->groups[head];
    AssumedMasses& assumed = result->assumed[head];
    const bool answered_densely =
        group.action == Action::kDense && done.plan.mode == Mode::kEnforce;
    if (answered_densely) assumed = {};
    if (answered_densely || group.query_distance < 0.0F) continue;
    assumed.cis_excess = static_cast<float>(
        AssumedSharingExcess(group.key_norm_max, group.query_distance, shape.scale));
  }
}

bool AttendBatch::SettleRow(const Row& row, const AttendRow& done) {
  Sequence* cache = row.record->cache.get();
  if (done.plan.lists != nullptr) {
    cache->ListsUsed(row.call->layer, done.view.length);
    if (cache->list_bytes() > parts_.options->list_bytes_per_sequence_max) cache->DropLists();
  }
  AttendRowResult& result = row.call->results[row.index];
  if (!done.status.ok()) {
    // A device says in its own words why it failed a row; callers get a reason.
    const bool not_met = done.status.code() == absl::StatusCode::kFailedPrecondition;
    FailRow(row.call, row.index, row.first_token,
            not_met ? BoundNotMet(row.index, done.plan, result.certificates) : done.status);
    return false;
  }
  result.status = absl::OkStatus();
  float* const outputs = OutputsFrom(row.call, row.first_token);
  if (done.out != outputs) {
    std::copy_n(done.out, done.query_count * TokenFloats(*row.call), outputs);
  }
  if (row.kept) KeepRow(row, done);
  const uint32_t deferred = row.policy->deferred_exact_steps;
  if (deferred > 0 && done.plan.mode == Mode::kEnforce) {
    result.deferred = DeferExact(done, row.call->layer, deferred, row.record, parts_.device);
  }
  return true;
}

void AttendBatch::DescribeRow(const Row& row, const AttendRow& done, AttendStats* stats) const {
  AttendRowResult& result = row.call->results[row.index];
  const LayerShape& shape = row.record->model->layers[row.call->layer];
  FinishAssumed(shape, done, &result);
  const uint32_t window = shape.sliding_window;
  const uint32_t seen_by_last = window == 0 ? done.view.length : std::min(window, done.view.length);
  ++stats->attend_rows;
  for (const GroupReport& group : result.groups) AddGroup(group, seen_by_last, stats);
  for (const HeadCertificate& certificate : result.certificates) AddCertificate(certificate, stats);
}

}  // namespace kvservice
