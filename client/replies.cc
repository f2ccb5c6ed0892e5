#include "client/replies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "client/error.h"
#include "wire/lane_layout.h"

namespace kvservice::client {
namespace {

constexpr size_t kIdBytes = 16;

std::optional<Level> LevelFromProto(int level) {
  switch (level) {
    case v1::LEVEL_NONE:
      return Level::kNone;
    case v1::LEVEL_CONFIDENCE:
      return Level::kConfidence;
    case v1::LEVEL_DETERMINISTIC:
      return Level::kDeterministic;
    case v1::LEVEL_EXACT:
      return Level::kExact;
    default:
      return std::nullopt;
  }
}

std::optional<Action> ActionFromProto(int action) {
  switch (action) {
    case v1::ACTION_SELECTED:
      return Action::kSelected;
    case v1::ACTION_REUSED:
      return Action::kReused;
    case v1::ACTION_GROWN:
      return Action::kGrown;
    case v1::ACTION_DENSE:
      return Action::kDense;
    case v1::ACTION_COMPENSATED:
      return Action::kCompensated;
    default:
      return std::nullopt;
  }
}

std::optional<Selector> SelectorFromProto(int selector) {
  switch (selector) {
    case v1::SELECTOR_AUTO:
      return Selector::kAuto;
    case v1::SELECTOR_DENSE:
      return Selector::kDense;
    case v1::SELECTOR_GIVEN:
      return Selector::kGiven;
    case v1::SELECTOR_CIS:
      return Selector::kCis;
    case v1::SELECTOR_PSAW:
      return Selector::kPsaw;
    case v1::SELECTOR_ETF:
      return Selector::kEtf;
    case v1::SELECTOR_CPE:
      return Selector::kCpe;
    case v1::SELECTOR_CERTIFIED:
      return Selector::kCertified;
    case v1::SELECTOR_SCAN:
      return Selector::kScan;
    default:
      return std::nullopt;
  }
}

// Where a row's numbers are in the call's tensors.
struct RowPlace {
  std::string field;
  size_t token_begin = 0;
  size_t token_count = 0;
  size_t head_count = 0;
  size_t head_dim = 0;
};

// The payload of a tensor that has to be float32 of this shape.
std::optional<absl::Span<const std::byte>> FloatPayload(const v1::Tensor& tensor,
                                                        std::initializer_list<int64_t> shape,
                                                        const ReplyRegion& region) {
  uint64_t bytes = sizeof(float);
  for (const int64_t extent : shape) bytes *= static_cast<uint64_t>(extent);
  if (tensor.dtype() != v1::DATA_TYPE_FLOAT32 ||
      !std::equal(shape.begin(), shape.end(), tensor.shape().begin(), tensor.shape().end())) {
    return std::nullopt;
  }
  if (!tensor.has_region()) {
    if (tensor.data().size() != bytes) return std::nullopt;
    return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(tensor.data().data()), bytes);
  }
  const uint64_t offset = tensor.region().offset_bytes();
  if (tensor.region().length_bytes() != bytes || offset < region.offset ||
      !wire::IsRange(offset - region.offset, bytes, region.bytes.size())) {
    return std::nullopt;
  }
  return region.bytes.subspan(offset - region.offset, bytes);
}

std::vector<float> FloatsOf(absl::Span<const std::byte> payload, size_t begin, size_t count) {
  std::vector<float> values(count);
  std::memcpy(values.data(), payload.data() + begin * sizeof(float), count * sizeof(float));
  return values;
}

bool HaveSize(const v1::Certificates& from, size_t count) {
  const auto is = [count](int size) { return static_cast<size_t>(size) == count; };
  return is(from.level_size()) && is(from.action_size()) && is(from.met_size()) &&
         is(from.dropped_mass_upper_size()) && is(from.dropped_mass_lower_size()) &&
         is(from.log_kept_lower_size()) && is(from.log_kept_upper_size()) &&
         is(from.log_dropped_lower_size()) && is(from.log_dropped_upper_size()) &&
         is(from.dropped_mass_estimate_size()) &&
         (from.failure_probability().empty() || is(from.failure_probability_size())) &&
         (from.output_error_upper().empty() || is(from.output_error_upper_size())) &&
         from.value_norm_lower_size() == from.output_error_upper_size() &&
         (from.keys_sampled().empty() || is(from.keys_sampled_size())) &&
         from.rows_sampled_size() == from.keys_sampled_size();
}

// Comparisons are written so that NaN fails them.
bool IsConsistent(const HeadCertificate& head) {
  const double lower = head.dropped_mass_lower.value;
  const double upper = head.dropped_mass_upper.value;
  return lower >= 0.0 && lower <= upper && upper <= 1.0 &&
         head.log_kept_lower.value <= head.log_kept_upper.value &&
         head.log_dropped_lower.value <= head.log_dropped_upper.value &&
         head.failure_probability >= 0.0 && head.failure_probability <= 1.0 &&
         head.output_error_upper >= 0.0 && head.value_norm_lower >= 0.0;
}

// Columns that are left out when they say nothing.
void OptionalFromProto(const v1::Certificates& from, int i, HeadCertificate* head) {
  if (!from.failure_probability().empty()) head->failure_probability = from.failure_probability(i);
  if (!from.output_error_upper().empty()) {
    head->output_error_upper = static_cast<double>(from.output_error_upper(i));
    head->value_norm_lower = static_cast<double>(from.value_norm_lower(i));
  }
  if (!from.keys_sampled().empty()) {
    head->keys_sampled = from.keys_sampled(i);
    head->rows_sampled = from.rows_sampled(i);
  }
}

absl::Status CertificatesFromProto(const v1::Certificates& from, const RowPlace& place,
                                   AttendRowResult* to) {
  const std::string field = place.field + ".certificates";
  const size_t count = place.token_count * place.head_count;
  if (!HaveSize(from, count)) return MalformedReply(field, "are not one per query and head");
  to->certificates.reserve(count);
  for (size_t n = 0; n < count; ++n) {
    const int i = static_cast<int>(n);
    const std::optional<Level> level = LevelFromProto(from.level(i));
    const std::optional<Action> action = ActionFromProto(from.action(i));
    if (!level.has_value() || !action.has_value()) {
      return MalformedReply(field, "have a level or an action that this version does not know");
    }
    HeadCertificate head;
    head.level = *level;
    head.action = *action;
    head.met = from.met(i);
    head.log_kept = static_cast<double>(to->lse[n]);
    head.log_kept_lower.value = from.log_kept_lower(i);
    head.log_kept_upper.value = from.log_kept_upper(i);
    head.log_dropped_lower.value = from.log_dropped_lower(i);
    head.log_dropped_upper.value = from.log_dropped_upper(i);
    head.dropped_mass_lower.value = static_cast<double>(from.dropped_mass_lower(i));
    head.dropped_mass_upper.value = static_cast<double>(from.dropped_mass_upper(i));
    head.dropped_mass_estimate = from.dropped_mass_estimate(i);
    OptionalFromProto(from, i, &head);
    if (!IsConsistent(head)) return MalformedReply(field, "contradict themselves");
    to->certificates.push_back(head);
  }
  return absl::OkStatus();
}

// Columns that are left out when they say nothing of any KV head.
absl::Status GroupColumnsFromProto(const v1::GroupReports& from, const std::string& field,
                                   std::vector<GroupReport>* to) {
  const std::pair<const google::protobuf::RepeatedField<float>*, float GroupReport::*> columns[] = {
      {&from.sharing_estimate(), &GroupReport::sharing_estimate},
      {&from.assumed_cis_excess_mass(), &GroupReport::assumed_cis_excess_mass},
      {&from.assumed_psaw_dropped_mass(), &GroupReport::assumed_psaw_dropped_mass},
      {&from.assumed_etf_excess_mass(), &GroupReport::assumed_etf_excess_mass},
      {&from.key_norm_max(), &GroupReport::key_norm_max},
      {&from.query_distance(), &GroupReport::query_distance}};
  for (const auto& [column, member] : columns) {
    if (column->empty()) continue;
    if (static_cast<size_t>(column->size()) != to->size()) {
      return MalformedReply(field, "are not one per KV head");
    }
    for (int i = 0; i < column->size(); ++i) (*to)[static_cast<size_t>(i)].*member = column->Get(i);
  }
  return absl::OkStatus();
}

absl::Status GroupsFromProto(const v1::GroupReports& from, const RowPlace& place,
                             AttendRowResult* to) {
  const std::string field = place.field + ".groups";
  const int count = from.action_size();
  const bool divides = count > 0 && place.head_count % static_cast<size_t>(count) == 0;
  if (!divides || from.scanned_size() != count || from.tokens_read_size() != count ||
      from.tokens_scanned_size() != count || from.similarity_size() != count ||
      from.keys_sampled_size() != count || from.rows_sampled_size() != count) {
    return MalformedReply(field, "are not one per KV head");
  }
  to->groups.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const std::optional<Action> action = ActionFromProto(from.action(i));
    if (!action.has_value()) {
      return MalformedReply(field, "have an action that this version does not know");
    }
    to->groups.push_back({.action = *action,
                          .scanned = from.scanned(i),
                          .tokens_read = from.tokens_read(i),
                          .tokens_scanned = from.tokens_scanned(i),
                          .similarity = from.similarity(i),
                          .keys_sampled = from.keys_sampled(i),
                          .rows_sampled = from.rows_sampled(i)});
  }
  return GroupColumnsFromProto(from, field, &to->groups);
}

absl::Status SelectedFromProto(const v1::AttendRowResult& from, bool asked, const RowPlace& place,
                               AttendRowResult* to) {
  const std::string field = place.field + ".selected";
  const size_t expected = asked ? to->groups.size() : 0;
  if (static_cast<size_t>(from.selected_size()) != expected) {
    return MalformedReply(field, "are not one list per KV head");
  }
  for (const v1::SelectedPositions& list : from.selected()) {
    std::vector<uint32_t> positions(list.positions().begin(), list.positions().end());
    const bool ascends = std::is_sorted(positions.begin(), positions.end(),
                                        [](uint32_t a, uint32_t b) { return a <= b; });
    if (!ascends || (!positions.empty() && positions.back() >= to->attended_tokens)) {
      return MalformedReply(field, "do not ascend below the attended length");
    }
    to->selected.push_back(std::move(positions));
  }
  return absl::OkStatus();
}

absl::Status DeferredFromProto(const v1::AttendRowResult& from, const RowPlace& place,
                               AttendRowResult* to) {
  for (const v1::DeferredMasses& masses : from.deferred()) {
    const size_t count = masses.query_count() * place.head_count;
    const auto& upper = masses.dropped_mass_upper();
    const auto& lower = masses.dropped_mass_lower();
    const bool fits = static_cast<size_t>(upper.size()) == count && upper.size() == lower.size();
    // NaN is not in order.
    if (!fits || !std::equal(lower.begin(), lower.end(), upper.begin(),
                             [](float a, float b) { return a <= b; })) {
      return MalformedReply(place.field + ".deferred", "are not in order, one per query and head");
    }
    to->deferred.push_back({.position = masses.position(),
                            .query_count = masses.query_count(),
                            .dropped_mass_upper = {upper.begin(), upper.end()},
                            .dropped_mass_lower = {lower.begin(), lower.end()}});
  }
  return absl::OkStatus();
}

absl::Status RowFromProto(const v1::AttendRow& row, bool asked_selected,
                          const v1::AttendRowResult& from, const RowPlace& place,
                          AttendRowResult* to) {
  const std::optional<Selector> selector = SelectorFromProto(from.selector());
  if (!selector.has_value()) return MalformedReply(place.field + ".selector", "is unknown");
  to->selector = *selector;
  to->attended_tokens = from.attended_tokens();
  if (uint64_t{to->attended_tokens} != uint64_t{row.position()} + place.token_count) {
    return MalformedReply(place.field + ".attended_tokens", "is not the end of the row");
  }
  if (from.generation() != row.handle().generation()) {
    return MalformedReply(place.field + ".generation", "is not the row's");
  }
  absl::Status status = CertificatesFromProto(from.certificates(), place, to);
  if (status.ok()) status = GroupsFromProto(from.groups(), place, to);
  if (status.ok()) status = SelectedFromProto(from, asked_selected, place, to);
  if (status.ok()) status = DeferredFromProto(from, place, to);
  return status;
}

absl::Status CheckCall(const v1::AttendRequest& request, const v1::AttendResponse& response) {
  if (response.step_id() != request.step_id()) {
    return MalformedReply("step_id", "is not the request's");
  }
  if (response.results_size() != request.rows_size()) {
    return MalformedReply("results", "are " + std::to_string(response.results_size()) +
                                         ", the rows were " + std::to_string(request.rows_size()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttendResult> ResultFromProto(const v1::AttendRequest& request,
                                             const v1::AttendResponse& response,
                                             const ReplyRegion& region,
                                             absl::Span<const std::byte>* out_payload) {
  const absl::Status checked = CheckCall(request, response);
  if (!checked.ok()) return checked;
  const auto& shape = request.q().shape();
  const auto lse = FloatPayload(response.lse(), {shape[0], shape[1]}, region);
  if (!lse.has_value()) return MalformedReply("lse", "is not float32 of the shape of q");
  const auto out = FloatPayload(response.out(), {shape[0], shape[1], shape[2]}, region);
  if (!out.has_value()) return MalformedReply("out", "is not float32 of the shape of q");
  if (out_payload != nullptr) *out_payload = *out;
  AttendResult result;
  result.call_number = response.call_number();
  result.epoch = response.epoch();
  result.draw_secret_id = response.draw_secret_id();
  result.queue_ns = response.queue_ns();
  result.service_ns = response.service_ns();
  result.rows.resize(static_cast<size_t>(request.rows_size()));
  RowPlace place;
  place.head_count = static_cast<size_t>(request.q().shape(1));
  place.head_dim = static_cast<size_t>(request.q().shape(2));
  for (int i = 0; i < request.rows_size(); ++i, place.token_begin += place.token_count) {
    const v1::AttendRowResult& from = response.results(i);
    AttendRowResult& to = result.rows[static_cast<size_t>(i)];
    place.token_count = request.rows(i).query_count();
    if (from.code() != 0) {
      to.status = MakeError(from.code(), from.message(), from.reason(), from.field(),
                            {from.metadata().begin(), from.metadata().end()});
      continue;
    }
    place.field = "results[" + std::to_string(i) + "]";
    const size_t begin = place.token_begin * place.head_count;
    const size_t count = place.token_count * place.head_count;
    to.lse = FloatsOf(*lse, begin, count);
    if (out_payload == nullptr) {
      to.out = FloatsOf(*out, begin * place.head_dim, count * place.head_dim);
    }
    const absl::Status status =
        RowFromProto(request.rows(i), request.return_selected(), from, place, &to);
    if (!status.ok()) return status;
  }
  return result;
}

absl::Status CheckSequence(const v1::Sequence& sequence, const std::string& expected_id) {
  const std::string& id = sequence.handle().id();
  if (id.size() != kIdBytes) return MalformedReply("sequence.handle.id", "does not have 16 bytes");
  if (expected_id.empty() || id == expected_id) return absl::OkStatus();
  return MalformedReply("sequence.handle.id", "is another sequence's");
}

SequenceInfo InfoFromProto(const v1::Sequence& sequence) {
  return {.model = sequence.model(),
          .length_tokens = sequence.length_tokens(),
          .length_max_tokens = sequence.length_max_tokens(),
          .block_count = sequence.block_count(),
          .bytes = sequence.bytes(),
          .is_on_disk = sequence.tier() == v1::TIER_DISK,
          .is_suspended = sequence.suspended(),
          .durable_tokens = sequence.durable_tokens(),
          .matched_tokens = sequence.matched_tokens(),
          .matchable_tokens = sequence.matchable_tokens(),
          .lease_remaining = std::chrono::milliseconds(sequence.lease_remaining_ms()),
          .certificates = sequence.totals().certificates(),
          .certificates_proven = sequence.totals().certificates_proven(),
          .anchor_seed_scans = sequence.totals().anchor_seed_scans(),
          .dropped_mass_upper_max = sequence.totals().dropped_mass_upper_max()};
}

}  // namespace kvservice::client
