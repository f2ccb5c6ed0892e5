#include "client/replies.h"

#include <google/protobuf/arena.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "client/error.h"
#include "client/reply_parts.h"
#include "wire/lane_layout.h"

namespace kvservice::client {
namespace {

constexpr size_t kIdBytes = 16;

constexpr std::optional<Level> LevelFromProto(int level) {
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

constexpr std::optional<Action> ActionFromProto(int action) {
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

// What a byte of a column stands for.
constexpr uint8_t kUnknown = 0xFF;
using Meanings = std::array<uint8_t, 256>;

template <typename FromProto>
constexpr Meanings MeaningsOf(FromProto from_proto) {
  Meanings meanings{};
  for (size_t i = 0; i < meanings.size(); ++i) {
    const auto meaning = from_proto(static_cast<int>(i));
    meanings[i] = meaning.has_value() ? static_cast<uint8_t>(*meaning) : kUnknown;
  }
  return meanings;
}

constexpr Meanings kLevels = MeaningsOf(LevelFromProto);
constexpr Meanings kActions = MeaningsOf(ActionFromProto);

// Where a row's numbers are in the call's tensors.
struct RowPlace {
  int index = 0;
  size_t token_begin = 0;
  size_t token_count = 0;
  size_t head_count = 0;
  size_t head_dim = 0;
};

// Made for errors only: rows are many.
absl::Status MalformedRow(const RowPlace& place, std::string_view member,
                          std::string_view problem) {
  return MalformedReply("results[" + std::to_string(place.index) + "]." + std::string(member),
                        problem);
}

// The payload of a tensor that has to be float32 of this shape.
std::optional<absl::Span<const std::byte>> FloatPayload(const TensorParts& tensor,
                                                        std::initializer_list<int64_t> shape,
                                                        const ReplyRegion& region) {
  uint64_t bytes = sizeof(float);
  for (const int64_t extent : shape) bytes *= static_cast<uint64_t>(extent);
  if (tensor.dtype != v1::DATA_TYPE_FLOAT32 ||
      !std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    return std::nullopt;
  }
  if (!tensor.has_region) {
    if (tensor.data.size() != bytes) return std::nullopt;
    return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(tensor.data.data()), bytes);
  }
  const uint64_t offset = tensor.offset_bytes;
  if (tensor.length_bytes != bytes || offset < region.offset ||
      !wire::IsRange(offset - region.offset, bytes, region.bytes.size())) {
    return std::nullopt;
  }
  return region.bytes.subspan(offset - region.offset, bytes);
}

bool IsAt(const TensorParts& tensor, uint64_t offset) {
  return tensor.has_region && tensor.offset_bytes == offset;
}

TensorParts PartsOf(const v1::Tensor& tensor) {
  return {.dtype = tensor.dtype(),
          .shape = {tensor.shape().begin(), tensor.shape().end()},
          .data = tensor.data(),
          .has_region = tensor.has_region(),
          .offset_bytes = tensor.region().offset_bytes(),
          .length_bytes = tensor.region().length_bytes()};
}

void CopyFloats(absl::Span<const std::byte> payload, size_t begin, size_t count,
                std::vector<float>* to) {
  to->resize(count);
  std::memcpy(to->data(), payload.data() + begin * sizeof(float), count * sizeof(float));
}

// Columns that are left out when they say nothing are not needed.
bool HaveSize(const Columns& from, size_t count) {
  using C = v1::Certificates;
  for (const int number : {C::kLevelFieldNumber, C::kActionFieldNumber, C::kMetFieldNumber}) {
    if (!from[number].Has<uint8_t>(count)) return false;
  }
  for (const int number : {C::kDroppedMassUpperFieldNumber, C::kDroppedMassLowerFieldNumber,
                           C::kDroppedMassEstimateFieldNumber}) {
    if (!from[number].Has<float>(count)) return false;
  }
  for (const int number : {C::kLogKeptLowerFieldNumber, C::kLogKeptUpperFieldNumber,
                           C::kLogDroppedLowerFieldNumber, C::kLogDroppedUpperFieldNumber}) {
    if (!from[number].Has<double>(count)) return false;
  }
  const Column failure = from[C::kFailureProbabilityFieldNumber];
  const Column error = from[C::kOutputErrorUpperFieldNumber];
  // Not read here, but it must be one.
  const Column relative = from[C::kOutputErrorRelativeUpperFieldNumber];
  if (relative.bytes().size() % sizeof(float) != 0) return false;
  return (failure.empty() || failure.Has<double>(count)) &&
         (error.empty() || error.Has<float>(count)) &&
         from[C::kValueNormLowerFieldNumber].Has<float>(error.empty() ? 0 : count);
}

// Comparisons are written so that NaN fails them, and without branches.
bool IsConsistent(const HeadCertificate& head) {
  const double lower = head.dropped_mass_lower.value;
  const double upper = head.dropped_mass_upper.value;
  return (lower >= 0.0) & (lower <= upper) & (upper <= 1.0) &
         (head.log_kept_lower.value <= head.log_kept_upper.value) &
         (head.log_dropped_lower.value <= head.log_dropped_upper.value);
}

// Columns that are left out when they say nothing. False if they contradict themselves or have
// another size.
bool OptionalFromProto(const Columns& from, absl::Span<HeadCertificate> to) {
  using C = v1::Certificates;
  bool sound = true;
  if (const Column column = from[C::kFailureProbabilityFieldNumber]; !column.empty()) {
    for (size_t i = 0; i < to.size(); ++i) {
      const auto probability = column.At<double>(i);
      to[i].failure_probability = probability;
      sound &= (probability >= 0.0) & (probability <= 1.0);
    }
  }
  if (const Column column = from[C::kOutputErrorUpperFieldNumber]; !column.empty()) {
    const Column norms = from[C::kValueNormLowerFieldNumber];
    for (size_t i = 0; i < to.size(); ++i) {
      const auto error = static_cast<double>(column.At<float>(i));
      const auto norm = static_cast<double>(norms.At<float>(i));
      to[i].output_error_upper = error;
      to[i].value_norm_lower = norm;
      sound &= (error >= 0.0) & (norm >= 0.0);
    }
  }
  return sound;
}

// The same of those whose size is seen only when they are read.
bool SamplesFromProto(const Columns& from, absl::Span<HeadCertificate> to) {
  const Column keys_column = from[v1::Certificates::kKeysSampledFieldNumber];
  const Column rows_column = from[v1::Certificates::kRowsSampledFieldNumber];
  if (keys_column.empty() && rows_column.empty()) return true;
  VarintReader keys(keys_column);
  VarintReader rows(rows_column);
  for (HeadCertificate& head : to) {
    head.keys_sampled = keys.Next();
    head.rows_sampled = rows.Next();
  }
  return keys.is_done() && rows.is_done();
}

// One number of each head. The column has as many.
template <typename T, typename Put>
void Fill(const Column& column, absl::Span<HeadCertificate> to, Put put) {
  const char* at = column.bytes().data();
  for (HeadCertificate& head : to) {
    T value;
    std::memcpy(&value, at, sizeof(value));
    put(&head, value);
    at += sizeof(value);
  }
}

// Column by column: there are more than a processor has registers. False if there is a level or an
// action that this version does not know.
bool FillHeads(const Columns& from, absl::Span<HeadCertificate> to) {
  using C = v1::Certificates;
  using Head = HeadCertificate;
  bool known = true;
  Fill<uint8_t>(from[C::kLevelFieldNumber], to, [&known](Head* head, uint8_t value) {
    head->level = static_cast<Level>(kLevels[value]);
    known &= kLevels[value] != kUnknown;
  });
  Fill<uint8_t>(from[C::kActionFieldNumber], to, [&known](Head* head, uint8_t value) {
    head->action = static_cast<Action>(kActions[value]);
    known &= kActions[value] != kUnknown;
  });
  Fill<uint8_t>(from[C::kMetFieldNumber], to, [&known](Head* head, uint8_t value) {
    head->met = value != 0;
    known &= value <= 1;
  });
  Fill<float>(from[C::kDroppedMassUpperFieldNumber], to, [](Head* head, float value) {
    head->dropped_mass_upper.value = static_cast<double>(value);
  });
  Fill<float>(from[C::kDroppedMassLowerFieldNumber], to, [](Head* head, float value) {
    head->dropped_mass_lower.value = static_cast<double>(value);
  });
  Fill<double>(from[C::kLogKeptLowerFieldNumber], to,
               [](Head* head, double value) { head->log_kept_lower.value = value; });
  Fill<double>(from[C::kLogKeptUpperFieldNumber], to,
               [](Head* head, double value) { head->log_kept_upper.value = value; });
  Fill<double>(from[C::kLogDroppedLowerFieldNumber], to,
               [](Head* head, double value) { head->log_dropped_lower.value = value; });
  Fill<double>(from[C::kLogDroppedUpperFieldNumber], to,
               [](Head* head, double value) { head->log_dropped_upper.value = value; });
  Fill<float>(from[C::kDroppedMassEstimateFieldNumber], to,
              [](Head* head, float value) { head->dropped_mass_estimate = value; });
  return known;
}

absl::Status CertificatesFromProto(std::string_view message, const RowPlace& place,
                                   AttendRowResult* to) {
  constexpr char kMember[] = "certificates";
  const size_t count = place.token_count * place.head_count;
  Columns from;
  if (!from.Read(message) || !HaveSize(from, count)) {
    return MalformedRow(place, kMember, "are not one per query and head");
  }
  to->certificates.resize(count);
  const absl::Span<HeadCertificate> heads = absl::MakeSpan(to->certificates);
  const bool known = FillHeads(from, heads);
  bool consistent = true;
  for (size_t i = 0; i < count; ++i) {
    heads[i].log_kept = static_cast<double>(to->lse[i]);
    consistent &= IsConsistent(heads[i]);
  }
  if (!known) {
    return MalformedRow(place, kMember,
                        "have a level or an action that this version does not know");
  }
  if (!OptionalFromProto(from, heads) || !consistent) {
    return MalformedRow(place, kMember, "contradict themselves");
  }
  if (!SamplesFromProto(from, heads)) {
    return MalformedRow(place, kMember, "are not one per query and head");
  }
  return absl::OkStatus();
}

// Columns that are left out when they say nothing of any KV head. False if one has another size.
bool GroupColumnsFromProto(const Columns& from, std::vector<GroupReport>* to) {
  using G = v1::GroupReports;
  constexpr std::pair<int, float GroupReport::*> kMembers[] = {
      {G::kSharingEstimateFieldNumber, &GroupReport::sharing_estimate},
      {G::kAssumedCisExcessMassFieldNumber, &GroupReport::assumed_cis_excess_mass},
      {G::kAssumedPsawDroppedMassFieldNumber, &GroupReport::assumed_psaw_dropped_mass},
      {G::kAssumedEtfExcessMassFieldNumber, &GroupReport::assumed_etf_excess_mass},
      {G::kKeyNormMaxFieldNumber, &GroupReport::key_norm_max},
      {G::kQueryDistanceFieldNumber, &GroupReport::query_distance}};
  for (const auto& [number, member] : kMembers) {
    const Column column = from[number];
    if (column.empty()) continue;
    if (!column.Has<float>(to->size())) return false;
    for (size_t i = 0; i < to->size(); ++i) (*to)[i].*member = column.At<float>(i);
  }
  return true;
}

absl::Status GroupsFromProto(std::string_view message, const RowPlace& place, AttendRowResult* to) {
  using G = v1::GroupReports;
  constexpr char kMember[] = "groups";
  Columns from;
  const bool sound = from.Read(message);
  const size_t count = from[G::kActionFieldNumber].bytes().size();
  if (!sound || count == 0 || place.head_count % count != 0 ||
      !from[G::kScannedFieldNumber].Has<uint8_t>(count) ||
      !from[G::kSimilarityFieldNumber].Has<float>(count)) {
    return MalformedRow(place, kMember, "are not one per KV head");
  }
  VarintReader tokens_read(from[G::kTokensReadFieldNumber]);
  VarintReader tokens_scanned(from[G::kTokensScannedFieldNumber]);
  VarintReader keys_sampled(from[G::kKeysSampledFieldNumber]);
  VarintReader rows_sampled(from[G::kRowsSampledFieldNumber]);
  bool known = true;
  to->groups.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const uint8_t action = kActions[from[G::kActionFieldNumber].At<uint8_t>(i)];
    const auto scanned = from[G::kScannedFieldNumber].At<uint8_t>(i);
    known &= (action != kUnknown) & (scanned <= 1);
    GroupReport& group = to->groups[i];
    group.action = static_cast<Action>(action);
    group.scanned = scanned != 0;
    group.tokens_read = tokens_read.Next();
    group.tokens_scanned = tokens_scanned.Next();
    group.similarity = from[G::kSimilarityFieldNumber].At<float>(i);
    group.keys_sampled = keys_sampled.Next();
    group.rows_sampled = rows_sampled.Next();
  }
  if (!known) {
    return MalformedRow(place, kMember, "have an action that this version does not know");
  }
  if (!tokens_read.is_done() || !tokens_scanned.is_done() || !keys_sampled.is_done() ||
      !rows_sampled.is_done() || !GroupColumnsFromProto(from, &to->groups)) {
    return MalformedRow(place, kMember, "are not one per KV head");
  }
  return absl::OkStatus();
}

absl::Status SelectedFromProto(const v1::AttendRowResult& from, bool asked, const RowPlace& place,
                               AttendRowResult* to) {
  constexpr char kMember[] = "selected";
  const size_t expected = asked ? to->groups.size() : 0;
  if (static_cast<size_t>(from.selected_size()) != expected) {
    return MalformedRow(place, kMember, "are not one list per KV head");
  }
  for (const v1::SelectedPositions& list : from.selected()) {
    std::vector<uint32_t> positions(list.positions().begin(), list.positions().end());
    const bool ascends = std::is_sorted(positions.begin(), positions.end(),
                                        [](uint32_t a, uint32_t b) { return a <= b; });
    if (!ascends || (!positions.empty() && positions.back() >= to->attended_tokens)) {
      return MalformedRow(place, kMember, "do not ascend below the attended length");
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
      return MalformedRow(place, "deferred", "are not in order, one per query and head");
    }
    to->deferred.push_back({.position = masses.position(),
                            .query_count = masses.query_count(),
                            .dropped_mass_upper = {upper.begin(), upper.end()},
                            .dropped_mass_lower = {lower.begin(), lower.end()}});
  }
  return absl::OkStatus();
}

absl::Status RowFromParts(const v1::AttendRow& row, bool asked_selected, const RowParts& from,
                          const RowPlace& place, AttendRowResult* to) {
  const std::optional<Selector> selector = SelectorFromProto(from.selector);
  if (!selector.has_value()) return MalformedRow(place, "selector", "is unknown");
  to->selector = *selector;
  to->attended_tokens = from.attended_tokens;
  if (uint64_t{to->attended_tokens} != uint64_t{row.position()} + place.token_count) {
    return MalformedRow(place, "attended_tokens", "is not the end of the row");
  }
  if (from.generation != row.handle().generation()) {
    return MalformedRow(place, "generation", "is not the row's");
  }
  absl::Status status = CertificatesFromProto(from.certificates, place, to);
  if (status.ok()) status = GroupsFromProto(from.groups, place, to);
  const v1::AttendRowResult& rest =
      from.rest != nullptr ? *from.rest : v1::AttendRowResult::default_instance();
  if (status.ok()) status = SelectedFromProto(rest, asked_selected, place, to);
  if (status.ok()) status = DeferredFromProto(rest, place, to);
  return status;
}

absl::Status CheckCall(const v1::AttendRequest& request, const ReplyParts& reply) {
  if (reply.step_id != request.step_id()) {
    return MalformedReply("step_id", "is not the request's");
  }
  if (reply.rows.size() != static_cast<size_t>(request.rows_size())) {
    return MalformedReply("results", "are " + std::to_string(reply.rows.size()) +
                                         ", the rows were " + std::to_string(request.rows_size()));
  }
  return absl::OkStatus();
}

absl::Status FailureFromProto(const v1::AttendRowResult& from) {
  return MakeError(from.code(), from.message(), from.reason(), from.field(),
                   {from.metadata().begin(), from.metadata().end()});
}

absl::StatusOr<AttendResult> ResultOf(const v1::AttendRequest& request, const ReplyParts& reply,
                                      const ReplyRegion& region,
                                      absl::Span<const std::byte>* out_payload,
                                      AttendResult result) {
  const absl::Status checked = CheckCall(request, reply);
  if (!checked.ok()) return checked;
  const auto& shape = request.q().shape();
  const auto lse = FloatPayload(reply.lse, {shape[0], shape[1]}, region);
  if (!lse.has_value()) return MalformedReply("lse", "is not float32 of the shape of q");
  const auto out = FloatPayload(reply.out, {shape[0], shape[1], shape[2]}, region);
  if (!out.has_value()) return MalformedReply("out", "is not float32 of the shape of q");
  if (region.places != nullptr) {
    constexpr char kProblem[] = "is not where it was to be";
    if (!IsAt(reply.lse, region.places->lse)) return MalformedReply("lse", kProblem);
    if (!IsAt(reply.out, region.places->out)) return MalformedReply("out", kProblem);
  }
  if (out_payload != nullptr) *out_payload = *out;
  result.call_number = reply.call_number;
  result.epoch = std::string(reply.epoch);
  result.draw_secret_id = reply.draw_secret_id;
  result.queue_ns = reply.queue_ns;
  result.service_ns = reply.service_ns;
  result.rows.resize(static_cast<size_t>(request.rows_size()));
  RowPlace place;
  place.head_count = static_cast<size_t>(request.q().shape(1));
  place.head_dim = static_cast<size_t>(request.q().shape(2));
  for (int i = 0; i < request.rows_size(); ++i, place.token_begin += place.token_count) {
    const RowParts& from = reply.rows[static_cast<size_t>(i)];
    AttendRowResult& to = result.rows[static_cast<size_t>(i)];
    place.index = i;
    place.token_count = request.rows(i).query_count();
    if (from.has_failed()) {
      to = {.status = FailureFromProto(*from.rest)};
      continue;
    }
    const size_t begin = place.token_begin * place.head_count;
    const size_t count = place.token_count * place.head_count;
    CopyFloats(*lse, begin, count, &to.lse);
    if (out_payload == nullptr) {
      CopyFloats(*out, begin * place.head_dim, count * place.head_dim, &to.out);
    }
    const absl::Status status =
        RowFromParts(request.rows(i), request.return_selected(), from, place, &to);
    if (!status.ok()) return status;
  }
  return result;
}

}  // namespace

absl::StatusOr<AttendResult> ResultFromProto(const v1::AttendRequest& request,
                                             const v1::AttendResponse& response,
                                             const ReplyRegion& region,
                                             absl::Span<const std::byte>* out) {
  // In the form that servers write them in, whichever they came in.
  std::vector<std::pair<std::string, std::string>> messages;
  for (const v1::AttendRowResult& row : response.results()) {
    messages.emplace_back(row.groups().SerializeAsString(), row.certificates().SerializeAsString());
  }
  ReplyParts reply = {.step_id = response.step_id(),
                      .call_number = response.call_number(),
                      .queue_ns = response.queue_ns(),
                      .service_ns = response.service_ns(),
                      .epoch = response.epoch(),
                      .draw_secret_id = response.draw_secret_id(),
                      .lse = PartsOf(response.lse()),
                      .out = PartsOf(response.out()),
                      .rows = {}};
  for (size_t i = 0; i < messages.size(); ++i) {
    const v1::AttendRowResult& row = response.results(static_cast<int>(i));
    reply.rows.push_back({.attended_tokens = row.attended_tokens(),
                          .selector = row.selector(),
                          .generation = row.generation(),
                          .groups = messages[i].first,
                          .certificates = messages[i].second,
                          .rest = &row});
  }
  return ResultOf(request, reply, region, out, {});
}

AttendResult PrepareResult(const v1::AttendRequest& request, bool with_out) {
  const auto head_count = static_cast<size_t>(request.q().shape(1));
  const auto head_dim = static_cast<size_t>(request.q().shape(2));
  AttendResult result;
  result.rows.resize(static_cast<size_t>(request.rows_size()));
  for (size_t i = 0; i < result.rows.size(); ++i) {
    AttendRowResult& row = result.rows[i];
    const size_t count = request.rows(static_cast<int>(i)).query_count() * head_count;
    row.lse.resize(count);
    if (with_out) row.out.resize(count * head_dim);
    row.certificates.resize(count);
    if (request.has_k()) row.groups.reserve(static_cast<size_t>(request.k().shape(1)));
  }
  return result;
}

absl::StatusOr<AttendResult> ResultFromMessage(const v1::AttendRequest& request,
                                               std::string_view message, const ReplyRegion& region,
                                               google::protobuf::Arena* arena,
                                               AttendResult prepared,
                                               absl::Span<const std::byte>* out) {
  ReplyParts reply;
  reply.rows.reserve(static_cast<size_t>(request.rows_size()));
  if (SplitReply(message, arena, &reply)) {
    absl::StatusOr<AttendResult> result =
        ResultOf(request, reply, region, out, std::move(prepared));
    if (result.ok()) return result;
  }
  // Whatever is wrong with it, or unusual, is protobuf's to say.
  auto* const response = google::protobuf::Arena::CreateMessage<v1::AttendResponse>(arena);
  if (!response->ParseFromArray(message.data(), static_cast<int>(message.size()))) {
    return MalformedReply("message", "does not parse");
  }
  return ResultFromProto(request, *response, region, out);
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
