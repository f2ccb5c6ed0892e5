#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/log_mass.h"
#include "kvservice/error.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"

namespace kvservice {
namespace {

std::string RowField(int row, std::string_view member) {
  return "rows[" + std::to_string(row) + "]." + std::string(member);
}

absl::Status RowFromProto(const v1::AttendRow& from, int index, AttendCallRow* to) {
  absl::StatusOr<SequenceId> id = IdFromProto(from.handle().id(), "rows[].handle.id");
  if (!id.ok()) {
    // The path of the row is built for errors only: this runs for every row of every call.
    return IdFromProto(from.handle().id(), RowField(index, "handle.id")).status();
  }
  to->id = *id;
  to->generation = from.handle().generation();
  to->position = from.position();
  to->query_count = from.query_count() == 0 ? 1 : from.query_count();
  to->given = from.given_positions();
  to->given_offsets = from.given_offsets();
  return absl::OkStatus();
}

absl::Status TensorsFromProto(const v1::AttendRequest& request, RegionCopy* region,
                              AttendCall* call) {
  // The engine has more threads to copy with. But k and v are copied now: whoever gave the call up
  // may use its memory again, and torn queries spoil an answer that nobody reads, where torn keys
  // would be stored.
  if (region != nullptr) region->LeaveLarge(true);
  absl::StatusOr<TensorView> q = TensorFromProto(request.q(), "q", region);
  if (region != nullptr) region->LeaveLarge(false);
  if (!q.ok()) return q.status();
  call->q = *q;
  if (request.has_k() != request.has_v()) {
    const std::string missing = request.has_k() ? "v" : "k";
    return InvalidField(missing, "TENSOR_MISSING",
                        missing + " is missing: both k and v or neither");
  }
  if (!request.has_k()) return absl::OkStatus();
  absl::StatusOr<TensorView> k = TensorFromProto(request.k(), "k", region);
  if (!k.ok()) return k.status();
  absl::StatusOr<TensorView> v = TensorFromProto(request.v(), "v", region);
  if (!v.ok()) return v.status();
  call->k = *k;
  call->v = *v;
  return absl::OkStatus();
}

absl::Status PoliciesFromProto(const v1::AttendRequest& request, const PolicyRegistry& registry,
                               AttendPolicies* policies, AttendCall* call) {
  if (request.has_policy()) {
    absl::StatusOr<Policy> policy = PolicyFromProto(request.policy(), "policy", registry);
    if (!policy.ok()) return policy.status();
    policies->call = *std::move(policy);
    call->policy = &policies->call;
  }
  // Reserved in full: rows point into it.
  policies->rows.reserve(static_cast<size_t>(request.rows_size()));
  for (int i = 0; i < request.rows_size(); ++i) {
    if (!request.rows(i).has_policy()) continue;
    absl::StatusOr<Policy> policy =
        PolicyFromProto(request.rows(i).policy(), RowField(i, "policy"), registry);
    if (!policy.ok()) return policy.status();
    policies->rows.push_back(*std::move(policy));
    call->rows[static_cast<size_t>(i)].policy = &policies->rows.back();
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status AttendFromProto(const v1::AttendRequest& request, const PolicyRegistry& registry,
                             RegionCopy* region, AttendPolicies* policies, AttendCall* call) {
  if (request.rows_size() == 0) {
    return InvalidField("rows", "ROWS_MISSING", "rows is empty, expected at least one");
  }
  call->layer = request.layer();
  call->want_selected = request.return_selected();
  call->rows.resize(static_cast<size_t>(request.rows_size()));
  for (int i = 0; i < request.rows_size(); ++i) {
    const absl::Status row = RowFromProto(request.rows(i), i, &call->rows[static_cast<size_t>(i)]);
    if (!row.ok()) return row;
  }
  absl::Status status = TensorsFromProto(request, region, call);
  if (status.ok()) status = PoliciesFromProto(request, registry, policies, call);
  return status;
}

absl::StatusOr<DType> OutputDTypeFromProto(const v1::AttendRequest& request) {
  if (request.output_dtype() == v1::DATA_TYPE_UNSPECIFIED) return DType::kFloat32;
  const std::optional<DType> dtype = DTypeFromProto(request.output_dtype());
  if (!dtype.has_value()) return UnknownDTypeError("output_dtype", request.output_dtype());
  return *dtype;
}

v1::Level LevelToProto(Level level) {
  switch (level) {
    case Level::kNone:
      return v1::LEVEL_NONE;
    case Level::kConfidence:
      return v1::LEVEL_CONFIDENCE;
    case Level::kDeterministic:
      return v1::LEVEL_DETERMINISTIC;
    case Level::kExact:
      return v1::LEVEL_EXACT;
  }
  return v1::LEVEL_UNSPECIFIED;
}

v1::Action ActionToProto(Action action) {
  switch (action) {
    case Action::kSelected:
      return v1::ACTION_SELECTED;
    case Action::kReused:
      return v1::ACTION_REUSED;
    case Action::kGrown:
      return v1::ACTION_GROWN;
    case Action::kDense:
      return v1::ACTION_DENSE;
    case Action::kCompensated:
      return v1::ACTION_COMPENSATED;
  }
  return v1::ACTION_UNSPECIFIED;
}

namespace {

// A column of so many numbers, to be filled in.
template <typename T>
T* ColumnOf(google::protobuf::RepeatedField<T>* field, size_t count) {
  field->Reserve(static_cast<int>(count));
  return field->AddNAlreadyReserved(static_cast<int>(count));
}

// Columns that most replies do without are written only if they say something.
void OutputErrorsToProto(const std::vector<HeadCertificate>& certificates, v1::Certificates* to) {
  if (std::all_of(certificates.begin(), certificates.end(), [](const HeadCertificate& head) {
        return std::isinf(head.output_error_upper);
      })) {
    return;
  }
  const size_t count = certificates.size();
  float* upper = ColumnOf(to->mutable_output_error_upper(), count);
  float* relative = ColumnOf(to->mutable_output_error_relative_upper(), count);
  float* norm_lower = ColumnOf(to->mutable_value_norm_lower(), count);
  for (const HeadCertificate& head : certificates) {
    *upper++ = RoundUpToFloat(head.output_error_upper);
    *relative++ = RoundUpToFloat(RelativeOutputError(head));
    *norm_lower++ = RoundDownToFloat(head.value_norm_lower);
  }
}

void SamplesToProto(const std::vector<HeadCertificate>& certificates, v1::Certificates* to) {
  if (std::all_of(certificates.begin(), certificates.end(), [](const HeadCertificate& head) {
        return head.keys_sampled == 0 && head.rows_sampled == 0;
      })) {
    return;
  }
  for (const HeadCertificate& head : certificates) {
    to->add_keys_sampled(head.keys_sampled);
    to->add_rows_sampled(head.rows_sampled);
  }
}

}  // namespace

void CertificatesToProto(const std::vector<HeadCertificate>& certificates, v1::Certificates* to) {
  // A call of many sequences has hundreds: columns are made once, in one go over what is in other
  // threads' caches.
  const size_t count = certificates.size();
  int* level = ColumnOf(to->mutable_level(), count);
  int* action = ColumnOf(to->mutable_action(), count);
  bool* met = ColumnOf(to->mutable_met(), count);
  float* mass_upper = ColumnOf(to->mutable_dropped_mass_upper(), count);
  float* mass_lower = ColumnOf(to->mutable_dropped_mass_lower(), count);
  double* kept_lower = ColumnOf(to->mutable_log_kept_lower(), count);
  double* kept_upper = ColumnOf(to->mutable_log_kept_upper(), count);
  double* dropped_lower = ColumnOf(to->mutable_log_dropped_lower(), count);
  double* dropped_upper = ColumnOf(to->mutable_log_dropped_upper(), count);
  float* mass_estimate = ColumnOf(to->mutable_dropped_mass_estimate(), count);
  bool any_failure_probability = false;
  for (const HeadCertificate& head : certificates) {
    *level++ = LevelToProto(head.level);
    *action++ = ActionToProto(head.action);
    *met++ = head.met;
    *mass_upper++ = RoundUpToFloat(head.dropped_mass_upper.value);
    *mass_lower++ = RoundDownToFloat(head.dropped_mass_lower.value);
    *kept_lower++ = head.log_kept_lower.value;
    *kept_upper++ = head.log_kept_upper.value;
    *dropped_lower++ = head.log_dropped_lower.value;
    *dropped_upper++ = head.log_dropped_upper.value;
    *mass_estimate++ = head.dropped_mass_estimate;
    any_failure_probability = any_failure_probability || head.failure_probability > 0.0;
  }
  OutputErrorsToProto(certificates, to);
  SamplesToProto(certificates, to);
  if (!any_failure_probability) return;
  for (const HeadCertificate& head : certificates) {
    to->add_failure_probability(head.failure_probability);
  }
}

namespace {

// A column that says nothing of any KV head (all negative) is left out.
template <typename Report>
void ColumnToProto(const std::vector<Report>& reports, float Report::*member,
                   google::protobuf::RepeatedField<float>* to) {
  const auto says = [member](const Report& report) { return report.*member >= 0.0F; };
  if (std::none_of(reports.begin(), reports.end(), says)) return;
  float* column = ColumnOf(to, reports.size());
  for (const Report& report : reports) *column++ = report.*member;
}

void GroupsToProto(const std::vector<GroupReport>& groups, v1::GroupReports* to) {
  const size_t count = groups.size();
  int* action = ColumnOf(to->mutable_action(), count);
  bool* scanned = ColumnOf(to->mutable_scanned(), count);
  uint32_t* tokens_read = ColumnOf(to->mutable_tokens_read(), count);
  uint32_t* tokens_scanned = ColumnOf(to->mutable_tokens_scanned(), count);
  float* similarity = ColumnOf(to->mutable_similarity(), count);
  uint32_t* keys_sampled = ColumnOf(to->mutable_keys_sampled(), count);
  uint32_t* rows_sampled = ColumnOf(to->mutable_rows_sampled(), count);
  for (const GroupReport& group : groups) {
    *action++ = ActionToProto(group.action);
    *scanned++ = group.scanned;
    *tokens_read++ = group.tokens_read;
    *tokens_scanned++ = group.tokens_scanned;
    *similarity++ = group.similarity;
    *keys_sampled++ = group.keys_sampled;
    *rows_sampled++ = group.rows_sampled;
  }
  ColumnToProto(groups, &GroupReport::sharing_estimate, to->mutable_sharing_estimate());
  ColumnToProto(groups, &GroupReport::key_norm_max, to->mutable_key_norm_max());
  ColumnToProto(groups, &GroupReport::query_distance, to->mutable_query_distance());
}

void AssumedToProto(const std::vector<AssumedMasses>& assumed, v1::GroupReports* to) {
  ColumnToProto(assumed, &AssumedMasses::cis_excess, to->mutable_assumed_cis_excess_mass());
  ColumnToProto(assumed, &AssumedMasses::psaw_dropped, to->mutable_assumed_psaw_dropped_mass());
  ColumnToProto(assumed, &AssumedMasses::etf_excess, to->mutable_assumed_etf_excess_mass());
}

void FailureToProto(const absl::Status& status, v1::AttendRowResult* to) {
  to->set_code(static_cast<int>(status.code()));
  to->set_message(status.message().data(), status.message().size());
  ErrorDetails details = DetailsOf(status);
  to->set_reason(std::move(details.reason));
  to->set_field(std::move(details.field));
  for (auto& [key, value] : details.metadata) (*to->mutable_metadata())[key] = std::move(value);
}

}  // namespace

void RowToProto(const AttendCallRow& row, const AttendRowResult& from, v1::AttendRowResult* to) {
  if (!from.status.ok()) {
    FailureToProto(from.status, to);
    return;
  }
  to->set_attended_tokens(from.attended_length);
  to->set_selector(SelectorToProto(from.selector));
  GroupsToProto(from.groups, to->mutable_groups());
  AssumedToProto(from.assumed, to->mutable_groups());
  CertificatesToProto(from.certificates, to->mutable_certificates());
  for (const std::vector<uint32_t>& positions : from.selected) {
    to->add_selected()->mutable_positions()->Add(positions.begin(), positions.end());
  }
  for (const DeferredMasses& masses : from.deferred) {
    v1::DeferredMasses* const deferred = to->add_deferred();
    deferred->set_position(masses.position);
    deferred->set_query_count(masses.query_count);
    for (const DeferredMass& mass : masses.heads) {
      deferred->add_dropped_mass_upper(RoundUpToFloat(mass.upper.value));
      deferred->add_dropped_mass_lower(RoundDownToFloat(mass.lower.value));
    }
  }
  // An attend leaves the generation alone, and a row of a stale one fails.
  to->set_generation(row.generation);
}

absl::StatusOr<AuditAsk> AuditFromProto(const v1::AuditRequest& request) {
  AuditAsk ask{.row_count = request.call_count(), .keep_next = request.keep_next(), .replay = {}};
  if (!request.has_replay()) return ask;
  const v1::Replay& replay = request.replay();
  ReplayAsk& to = ask.replay.emplace();
  if (replay.epoch().size() != to.epoch.size()) {
    return InvalidField("replay.epoch", "EPOCH_MALFORMED",
                        "replay.epoch has " + std::to_string(replay.epoch().size()) +
                            " bytes, expected " + std::to_string(to.epoch.size()));
  }
  std::memcpy(to.epoch.data(), replay.epoch().data(), to.epoch.size());
  to.call_number = replay.call_number();
  to.draw_secret_id = replay.draw_secret_id();
  to.row = replay.row();
  return ask;
}

void AuditTotalsToProto(const AuditStats& stats, v1::AuditTotals* totals) {
  totals->set_rows_audited(stats.rows_audited);
  totals->set_rows_cancelled(stats.rows_cancelled);
  totals->set_rows_skipped(stats.rows_skipped);
  totals->set_rows_waiting(stats.rows_waiting);
  totals->set_certificates_audited(stats.certificates);
  totals->set_outputs_audited(stats.outputs);
  totals->set_violations(stats.violations);
  totals->set_misses(stats.misses);
  totals->set_expected_misses(stats.expected_misses);
  totals->set_slack_count(stats.slack_count);
  totals->set_slack_median_nats(stats.slack_median_nats);
  totals->set_slack_p95_nats(stats.slack_p95_nats);
  totals->set_slack_max_nats(stats.slack_max_nats);
}

void AuditToProto(const AuditReport& report, v1::AuditResponse* response) {
  AuditTotalsToProto(report.stats, response->mutable_totals());
  response->set_kept_rows(report.kept_rows);
  response->set_keep_next_left(report.keep_next_left);
  response->mutable_call_numbers()->Add(report.call_numbers.begin(), report.call_numbers.end());
  for (const std::string& line : report.violations) response->add_violations(line);
  if (!report.replayed.empty()) {
    CertificatesToProto(report.replayed, response->mutable_replayed());
  }
  response->set_replay_equal(report.replay_equal);
}

absl::StatusOr<ExplainAsk> ExplainFromProto(const v1::ExplainRequest& request) {
  ExplainAsk ask;
  ask.layer = request.layer();
  ask.limits.assign(request.max_dropped_mass().begin(), request.max_dropped_mass().end());
  if (!request.has_q()) return ask;
  const absl::StatusOr<TensorView> q = TensorFromProto(request.q(), "q");
  if (!q.ok()) return q.status();
  ask.q = *q;
  return ask;
}

void ExplainToProto(const ExplainReport& report, v1::ExplainResponse* response) {
  response->set_position(report.position);
  response->set_query_count(report.query_count);
  for (const ExplainStep& from : report.steps) {
    v1::ExplainStep* const step = response->add_steps();
    step->set_max_dropped_mass(from.limit);
    for (const ExplainGroup& group : from.groups) {
      v1::ExplainGroup* const to = step->add_groups();
      to->set_action(ActionToProto(group.report.action));
      to->set_tokens_read(group.report.tokens_read);
      to->set_tokens_scanned(group.report.tokens_scanned);
      to->set_keys_sampled(group.report.keys_sampled);
      to->set_rows_sampled(group.report.rows_sampled);
      to->set_bytes(group.bytes);
      to->set_dense_bytes(group.dense_bytes);
      to->set_level(LevelToProto(group.level));
      to->set_met(group.met);
      to->set_dropped_mass_upper(RoundUpToFloat(group.dropped_mass_upper));
      to->set_output_error_relative_upper(RoundUpToFloat(group.output_error_relative_upper));
      to->set_failure_probability(group.failure_probability);
      step->set_bytes(step->bytes() + group.bytes);
      step->set_dense_bytes(step->dense_bytes() + group.dense_bytes);
    }
  }
}

void AttendToProto(const v1::AttendRequest& request, const AttendCall& call,
                   v1::AttendResponse* response) {
  response->set_step_id(request.step_id());
  response->set_call_number(call.call_number);
  response->set_epoch(call.epoch.data(), call.epoch.size());
  response->set_draw_secret_id(call.draw_secret_id);
}

}  // namespace kvservice
