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

absl::Status TensorsFromProto(const v1::AttendRequest& request, AttendCall* call) {
  absl::StatusOr<TensorView> q = TensorFromProto(request.q(), "q");
  if (!q.ok()) return q.status();
  call->q = *q;
  if (request.has_k() != request.has_v()) {
    const std::string missing = request.has_k() ? "v" : "k";
    return InvalidField(missing, "TENSOR_MISSING",
                        missing + " is missing: both k and v or neither");
  }
  if (!request.has_k()) return absl::OkStatus();
  absl::StatusOr<TensorView> k = TensorFromProto(request.k(), "k");
  if (!k.ok()) return k.status();
  absl::StatusOr<TensorView> v = TensorFromProto(request.v(), "v");
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
                             AttendPolicies* policies, AttendCall* call) {
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
  absl::Status status = TensorsFromProto(request, call);
  if (status.ok()) status = PoliciesFromProto(request, registry, policies, call);
  return status;
}

absl::StatusOr<DType> OutputDTypeFromProto(const v1::AttendRequest& request) {
  if (request.output_dtype() == v1::DATA_TYPE_UNSPECIFIED) return DType::kFloat32;
  const std::optional<DType> dtype = DTypeFromProto(request.output_dtype());
  if (!dtype.has_value()) return UnknownDTypeError("output_dtype", request.output_dtype());
  return *dtype;
}

namespace {

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

void CertificatesToProto(const std::vector<HeadCertificate>& certificates, v1::Certificates* to) {
  const int count = static_cast<int>(certificates.size());
  to->mutable_level()->Reserve(count);
  to->mutable_action()->Reserve(count);
  to->mutable_met()->Reserve(count);
  to->mutable_dropped_mass_upper()->Reserve(count);
  to->mutable_dropped_mass_lower()->Reserve(count);
  to->mutable_log_kept_lower()->Reserve(count);
  to->mutable_log_kept_upper()->Reserve(count);
  to->mutable_log_dropped_lower()->Reserve(count);
  to->mutable_log_dropped_upper()->Reserve(count);
  to->mutable_dropped_mass_estimate()->Reserve(count);
  bool any_failure_probability = false;
  for (const HeadCertificate& head : certificates) {
    to->add_level(LevelToProto(head.level));
    to->add_action(ActionToProto(head.action));
    to->add_met(head.met);
    to->add_dropped_mass_upper(RoundUpToFloat(head.dropped_mass_upper.value));
    to->add_dropped_mass_lower(RoundDownToFloat(head.dropped_mass_lower.value));
    to->add_log_kept_lower(head.log_kept_lower.value);
    to->add_log_kept_upper(head.log_kept_upper.value);
    to->add_log_dropped_lower(head.log_dropped_lower.value);
    to->add_log_dropped_upper(head.log_dropped_upper.value);
    to->add_dropped_mass_estimate(head.dropped_mass_estimate);
    any_failure_probability = any_failure_probability || head.failure_probability > 0.0;
  }
  if (!any_failure_probability) return;
  for (const HeadCertificate& head : certificates) {
    to->add_failure_probability(head.failure_probability);
  }
}

void GroupsToProto(const std::vector<GroupReport>& groups, v1::GroupReports* to) {
  for (const GroupReport& group : groups) {
    to->add_action(ActionToProto(group.action));
    to->add_scanned(group.scanned);
    to->add_tokens_read(group.tokens_read);
    to->add_tokens_scanned(group.tokens_scanned);
    to->add_similarity(group.similarity);
  }
}

void FailureToProto(const absl::Status& status, v1::AttendRowResult* to) {
  to->set_code(static_cast<int>(status.code()));
  to->set_message(status.message().data(), status.message().size());
  ErrorDetails details = DetailsOf(status);
  to->set_reason(std::move(details.reason));
  to->set_field(std::move(details.field));
  for (auto& [key, value] : details.metadata) (*to->mutable_metadata())[key] = std::move(value);
}

void RowToProto(const AttendCallRow& row, const AttendRowResult& from, v1::AttendRowResult* to) {
  if (!from.status.ok()) {
    FailureToProto(from.status, to);
    return;
  }
  to->set_attended_tokens(from.attended_length);
  to->set_selector(SelectorToProto(from.selector));
  GroupsToProto(from.groups, to->mutable_groups());
  CertificatesToProto(from.certificates, to->mutable_certificates());
  for (const std::vector<uint32_t>& positions : from.selected) {
    to->add_selected()->mutable_positions()->Add(positions.begin(), positions.end());
  }
  // An attend leaves the generation alone, and a row of a stale one fails.
  to->set_generation(row.generation);
}

}  // namespace

void AttendToProto(const v1::AttendRequest& request, const AttendCall& call,
                   v1::AttendResponse* response) {
  response->set_step_id(request.step_id());
  response->set_call_number(call.call_number);
  for (size_t i = 0; i < call.results.size(); ++i) {
    RowToProto(call.rows[i], call.results[i], response->add_results());
  }
}

}  // namespace kvservice
