#include "kvservice/explain.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "attention/rounding.h"
#include "attention/sketch.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/tensor_check.h"
#include "selector/selector.h"

namespace kvservice {
namespace {

constexpr float kLadder[] = {0.2F, 0.1F, 0.05F, 0.02F, 0.01F};

absl::Status CheckLimits(const ExplainAsk& ask) {
  if (ask.limits.size() > kExplainLimitsMax) {
    return InvalidField("max_dropped_mass", "EXPLAIN_INVALID",
                        absl::StrCat("max_dropped_mass has ", ask.limits.size(),
                                     " entries, at most ", kExplainLimitsMax, " are allowed"));
  }
  for (const float limit : ask.limits) {
    if (limit > 0.0F && limit < 1.0F) continue;
    return InvalidField("max_dropped_mass", "EXPLAIN_INVALID",
                        absl::StrCat("max_dropped_mass has ", limit, ", expected 0 to 1"));
  }
  return absl::OkStatus();
}

absl::Status CheckQuery(const SequenceRecord& record, const ExplainAsk& ask) {
  const KvLayout& layout = record.model->spec.layout;
  const absl::Status status = CheckTensor(
      *ask.q, {.shape = {kAnyExtent, layout.query_head_count, layout.head_dim}, .dtype = {}});
  if (!status.ok()) return status;
  const auto count = static_cast<uint64_t>(ask.q->shape[0]);
  const uint32_t length = record.cache->length(ask.layer);
  if (count > kQueryTokensMax || count > length) {
    return InvalidField("q", "TENSOR_SHAPE_MISMATCH",
                        absl::StrCat("q has ", count, " tokens, the layer ", length, ", at most ",
                                     kQueryTokensMax, " are allowed"));
  }
  return CheckFinite(*ask.q, 0, ask.q->bytes.size() / ElementBytes(ask.q->dtype));
}

// The query that is asked about: the caller's, at the end of the layer, or the one that was kept.
LastQuery QueryOf(const SequenceRecord& record, const ExplainAsk& ask) {
  if (!ask.q.has_value()) return record.last_queries[ask.layer];
  LastQuery query;
  query.query_count = static_cast<uint32_t>(ask.q->shape[0]);
  query.position = record.cache->length(ask.layer) - query.query_count;
  query.q.resize(ask.q->bytes.size() / ElementBytes(ask.q->dtype));
  for (size_t i = 0; i < query.q.size(); ++i) {
    query.q[i] = LoadElement(ask.q->dtype, ask.q->bytes.data(), i);
  }
  return query;
}

// The sequence's own policy as far as it goes, made certified.
Policy CertifiedPolicy(const Policy& of_sequence, float limit) {
  Policy policy = DefaultPolicy(SelectorKind::kCertified);
  policy.budget = of_sequence.budget;
  policy.layers.clear();
  policy.dense_below_tokens = 0;
  policy.failure_probability = of_sequence.failure_probability;
  policy.draws_max = of_sequence.draws_max;
  if (of_sequence.guarantee == Guarantee::kDeterministic) policy.guarantee = of_sequence.guarantee;
  policy.max_dropped_mass = limit;
  return policy;
}

uint64_t BytesOf(const GroupReport& group, const KvLayout& layout) {
  const size_t sketch_bytes = SketchLayout(layout.head_dim).slice_bytes(1) / kBlockTokens;
  return (uint64_t{group.tokens_read} + group.rows_sampled) * layout.row_bytes() +
         uint64_t{group.tokens_scanned} * sketch_bytes +
         uint64_t{group.keys_sampled} * layout.vector_bytes();
}

// One rung: what the device said about one plan.
struct Rung {
  ViewArrays view;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
};

ExplainStep StepOf(const Rung& rung, float limit, const KvLayout& layout, uint64_t dense_bytes) {
  ExplainStep step{.limit = limit, .groups = {}};
  for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
    ExplainGroup group{.report = rung.groups[kv_head]};
    group.bytes = BytesOf(group.report, layout);
    group.dense_bytes = dense_bytes;
    for (size_t i = 0; i < rung.certificates.size(); ++i) {
      if (i % layout.query_head_count / layout.group_size() != kv_head) continue;
      const HeadCertificate& head = rung.certificates[i];
      group.level = std::min(group.level, head.level);
      group.met = group.met && head.met;
      group.dropped_mass_upper = std::max(group.dropped_mass_upper, head.dropped_mass_upper.value);
      group.output_error_relative_upper =
          std::max(group.output_error_relative_upper, RelativeOutputError(head));
      group.failure_probability = AddUp(group.failure_probability, head.failure_probability);
    }
    step.groups.push_back(group);
  }
  return step;
}

}  // namespace

absl::Status CheckExplain(const SequenceRecord& record, ExplainAsk* ask) {
  const uint32_t layer_count = record.model->spec.layer_count;
  if (ask->layer >= layer_count) return LayerOutOfRange(ask->layer, layer_count);
  const absl::Status status = CheckLimits(*ask);
  if (!status.ok()) return status;
  if (ask->limits.empty()) ask->limits.assign(std::begin(kLadder), std::end(kLadder));
  if (ask->q.has_value()) return CheckQuery(record, *ask);
  const bool kept =
      ask->layer < record.last_queries.size() && !record.last_queries[ask->layer].q.empty();
  if (kept) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("no query of layer ", ask->layer, " is kept; give one"),
                   {.reason = "QUERY_NOT_KEPT", .field = "q", .metadata = {}});
}

ExplainReport Explain(const SequenceRecord& record, const ExplainAsk& ask, const DrawKeys& keys,
                      uint64_t call_number, Device* device) {
  const KvLayout& layout = record.model->spec.layout;
  const LayerShape& shape = record.model->layers[ask.layer];
  const LastQuery query = QueryOf(record, ask);
  const uint32_t length = query.position + query.query_count;
  std::vector<Rung> rungs(ask.limits.size());
  std::vector<AttendRow> rows(ask.limits.size());
  for (uint32_t i = 0; i < rows.size(); ++i) {
    Rung& rung = rungs[i];
    rung.out.resize(query.q.size());
    rung.lse.resize(size_t{query.query_count} * layout.query_head_count);
    rung.certificates.resize(rung.lse.size());
    rung.groups.resize(layout.kv_head_count);
    AttendRow& row = rows[i];
    row.view = record.cache->View(ask.layer, length, &rung.view);
    row.position = query.position;
    row.query_count = query.query_count;
    row.q = query.q.data();
    row.plan = MakePlan(CertifiedPolicy(record.policy, ask.limits[i]),
                        {.layer = ask.layer,
                         .layer_count = record.model->spec.layer_count,
                         .attended_length = length,
                         .query_count = query.query_count,
                         .sliding_window = shape.sliding_window,
                         .given = {},
                         .given_offsets = {}})
                   .plan;
    row.tables = record.tables->shape.TablesOf(ask.layer);
    row.draw_key = keys.KeyOf(call_number, i, record.id.bytes, ask.layer);
    row.out = rung.out.data();
    row.lse = rung.lse.data();
    row.certificates = rung.certificates.data();
    row.groups = rung.groups.data();
  }
  device->Attend(shape, absl::MakeSpan(rows));

  ExplainReport report{.position = query.position, .query_count = query.query_count, .steps = {}};
  const uint32_t visible =
      shape.sliding_window == 0 ? length : std::min(shape.sliding_window, length);
  const uint64_t dense_bytes = uint64_t{visible} * layout.row_bytes();
  for (size_t i = 0; i < rungs.size(); ++i) {
    report.steps.push_back(StepOf(rungs[i], ask.limits[i], layout, dense_bytes));
  }
  return report;
}

}  // namespace kvservice
