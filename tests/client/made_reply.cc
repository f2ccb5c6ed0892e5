#include "tests/client/made_reply.h"

#include <bit>
#include <cstdint>
#include <sstream>
#include <vector>

#include "client/status.h"

namespace kvservice::testing {
namespace {

constexpr uint64_t kStepId = 71;
constexpr uint64_t kGeneration = 300;
constexpr uint32_t kPosition = 1000;

uint32_t QueryCount(uint32_t row) { return row == 1 ? 2 : 1; }

// Numbers that differ, of all sizes.
void CertificatesOf(uint32_t count, bool optional, v1::Certificates* to) {
  for (uint32_t i = 0; i < count; ++i) {
    const float share = 1.0F / static_cast<float>(i + 3);
    to->add_level(static_cast<v1::Level>(v1::LEVEL_NONE + i % 4));
    to->add_action(static_cast<v1::Action>(v1::ACTION_SELECTED + i % 5));
    to->add_met(i % 3 != 0);
    to->add_dropped_mass_upper(share);
    to->add_dropped_mass_lower(share / 2);
    to->add_log_kept_lower(0.25 * i);
    to->add_log_kept_upper(0.25 * i + 0.125);
    to->add_log_dropped_lower(-0.5 * i - 2);
    to->add_log_dropped_upper(-0.5 * i - 1);
    to->add_dropped_mass_estimate(share / 3);
    if (!optional) continue;
    to->add_failure_probability(1e-6 * i);
    to->add_output_error_upper(0.5F * share);
    to->add_output_error_relative_upper(0.25F * share);
    to->add_value_norm_lower(2.0F + share);
    to->add_keys_sampled(i * 100);
    to->add_rows_sampled(i * 20000);
  }
}

void GroupsOf(bool optional, v1::GroupReports* to) {
  for (uint32_t i = 0; i < kMadeKvHeads; ++i) {
    const auto share = static_cast<float>(i) / 8;
    to->add_action(static_cast<v1::Action>(v1::ACTION_REUSED + i));
    to->add_scanned(i % 2 != 0);
    to->add_tokens_read(i * 300);
    to->add_tokens_scanned(i * 70000 + 1);
    to->add_similarity(share);
    to->add_keys_sampled(i);
    to->add_rows_sampled(4000000000U - i);
    if (!optional) continue;
    to->add_sharing_estimate(share + 1);
    to->add_assumed_cis_excess_mass(share + 2);
    to->add_assumed_psaw_dropped_mass(share + 3);
    to->add_assumed_etf_excess_mass(share + 4);
    to->add_key_norm_max(share + 5);
    to->add_query_distance(share + 6);
  }
}

void RowOf(uint32_t row, v1::AttendRowResult* to) {
  const bool optional = row == 1;
  to->set_attended_tokens(kPosition + row + QueryCount(row));
  to->set_selector(v1::SELECTOR_CERTIFIED);
  to->set_generation(kGeneration + row);
  GroupsOf(optional, to->mutable_groups());
  CertificatesOf(QueryCount(row) * kMadeHeads, optional, to->mutable_certificates());
  for (uint32_t i = 0; i < kMadeKvHeads; ++i) {
    v1::SelectedPositions* const list = to->add_selected();
    for (const uint32_t position : {i, i + 100, i + 500}) list->add_positions(position);
  }
  if (!optional) return;
  v1::DeferredMasses* const deferred = to->add_deferred();
  deferred->set_position(kPosition);
  deferred->set_query_count(1);
  for (uint32_t i = 0; i < kMadeHeads; ++i) {
    deferred->add_dropped_mass_lower(0.125F);
    deferred->add_dropped_mass_upper(0.25F);
  }
}

void FailureOf(v1::AttendRowResult* to) {
  to->set_code(5);
  to->set_message("there is no such sequence");
  to->set_reason("SEQUENCE_NOT_FOUND");
  to->set_field("rows[2].handle");
  (*to->mutable_metadata())["id"] = "ab";
}

void Describe(std::vector<int64_t> shape, v1::Tensor* to) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  to->set_dtype(v1::DATA_TYPE_FLOAT32);
  to->mutable_shape()->Add(shape.begin(), shape.end());
  for (int64_t i = 0; i < count * int64_t{sizeof(float)}; ++i) {
    to->mutable_data()->push_back(static_cast<char>(i % 60));
  }
}

// Every number as its bits.
class Text {
 public:
  template <typename T>
  Text& operator<<(const T& value) {
    if constexpr (std::is_same_v<T, float>) {
      stream_ << std::bit_cast<uint32_t>(value) << ' ';
    } else if constexpr (std::is_same_v<T, double>) {
      stream_ << std::bit_cast<uint64_t>(value) << ' ';
    } else if constexpr (std::is_enum_v<T>) {
      stream_ << static_cast<int>(value) << ' ';
    } else {
      stream_ << value << ' ';
    }
    return *this;
  }
  template <typename T>
  Text& operator<<(const std::vector<T>& values) {
    stream_ << '[';
    for (const T& value : values) *this << value;
    stream_ << "]\n";
    return *this;
  }
  Text& operator<<(const absl::Status& status) {
    *this << static_cast<int>(status.code()) << std::string(status.message())
          << client::ReasonOf(status) << client::FieldOf(status);
    for (const auto& [key, value] : client::MetadataOf(status)) *this << key << value;
    return *this;
  }
  Text& operator<<(const HeadCertificate& head) {
    return *this << head.level << head.action << head.met << head.log_kept
                 << head.log_kept_lower.value << head.log_kept_upper.value
                 << head.log_dropped_lower.value << head.log_dropped_upper.value
                 << head.dropped_mass_lower.value << head.dropped_mass_upper.value
                 << head.dropped_mass_estimate << head.output_error_upper << head.value_norm_lower
                 << head.failure_probability << head.keys_sampled << head.rows_sampled;
  }
  Text& operator<<(const client::GroupReport& group) {
    return *this << group.action << group.scanned << group.tokens_read << group.tokens_scanned
                 << group.similarity << group.keys_sampled << group.rows_sampled
                 << group.sharing_estimate << group.assumed_cis_excess_mass
                 << group.assumed_psaw_dropped_mass << group.assumed_etf_excess_mass
                 << group.key_norm_max << group.query_distance;
  }
  Text& operator<<(const client::DeferredMasses& masses) {
    return *this << masses.position << masses.query_count << masses.dropped_mass_upper
                 << masses.dropped_mass_lower;
  }
  Text& operator<<(const client::AttendRowResult& row) {
    return *this << row.status << row.attended_tokens << row.selector << row.out << row.lse
                 << row.certificates << row.groups << row.selected << row.deferred;
  }
  std::string Take() const { return stream_.str(); }

 private:
  std::ostringstream stream_;
};

}  // namespace

v1::AttendRequest MadeRequest() {
  v1::AttendRequest request;
  request.set_step_id(kStepId);
  request.set_return_selected(true);
  uint32_t token_count = 0;
  for (uint32_t i = 0; i < kMadeRows; ++i) {
    v1::AttendRow* const row = request.add_rows();
    row->mutable_handle()->set_generation(kGeneration + i);
    row->set_position(kPosition + i);
    row->set_query_count(QueryCount(i));
    token_count += QueryCount(i);
  }
  for (const uint32_t extent : {token_count, kMadeHeads, kMadeHeadDim}) {
    request.mutable_q()->add_shape(extent);
  }
  return request;
}

v1::AttendResponse MadeResponse() {
  v1::AttendResponse response;
  response.set_step_id(kStepId);
  response.set_call_number(12345);
  response.set_epoch("0123456789abcdef");
  response.set_draw_secret_id(77);
  response.set_queue_ns(5);
  response.set_service_ns(600);
  for (uint32_t i = 0; i + 1 < kMadeRows; ++i) RowOf(i, response.add_results());
  FailureOf(response.add_results());
  const v1::AttendRequest request = MadeRequest();
  const auto& shape = request.q().shape();
  Describe({shape[0], shape[1]}, response.mutable_lse());
  Describe({shape[0], shape[1], shape[2]}, response.mutable_out());
  return response;
}

std::string TextOf(const absl::StatusOr<client::AttendResult>& result) {
  Text text;
  text << result.status();
  if (!result.ok()) return text.Take();
  text << result->transport << result->call_number << result->epoch << result->draw_secret_id
       << result->queue_ns << result->service_ns << result->rows;
  return text.Take();
}

}  // namespace kvservice::testing
