// What RowToProto and protobuf make of a row, without the message between: a row has some 30
// columns, and to make the arrays for them costs more than to write them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "attention/log_mass.h"
#include "google/protobuf/io/coded_stream.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"

namespace kvservice {
namespace {

using google::protobuf::io::CodedOutputStream;

// The low bits of a tag.
constexpr uint32_t kVarint = 0, kLengthDelimited = 2;
// Of a tag, and of a length of less than 2^31.
constexpr size_t kHeadBytesMax = 5;
constexpr size_t kVarintBytesMax = 10;
// Of a message that has not been written before; 32 heads of one query need less.
constexpr size_t kFirstBytes = 4096;

uint32_t TagOf(int field, uint32_t type) { return static_cast<uint32_t>(field) << 3 | type; }

// Fields of a message that grows in a string.
class Writer {
 public:
  // Whatever was in `to` is gone; what it had allocated is used.
  explicit Writer(std::string* to) : to_(to) {
    to_->resize(std::max(to_->capacity(), kFirstBytes));
    At(0);
  }
  void Finish() { to_->resize(size()); }

  // As proto3 has it: 0 is left out.
  void Number(int field, uint64_t value) {
    if (value == 0) return;
    Reserve(kHeadBytesMax + kVarintBytesMax);
    at_ = CodedOutputStream::WriteVarint32ToArray(TagOf(field, kVarint), at_);
    at_ = CodedOutputStream::WriteVarint64ToArray(value, at_);
  }

  // One number of each, of fixed width. Truth values and enumerators have one byte.
  template <typename T, typename From, typename Get>
  void Column(int field, const std::vector<From>& from, Get get) {
    if (from.empty()) return;
    const size_t bytes = from.size() * sizeof(T);
    Reserve(2 * kHeadBytesMax + bytes);
    at_ = CodedOutputStream::WriteVarint32ToArray(TagOf(field, kLengthDelimited), at_);
    at_ = CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(bytes), at_);
    // Of its own: bytes that are written could be the member's.
    uint8_t* at = at_;
    for (const From& item : from) {
      const T value = get(item);
      std::memcpy(at, &value, sizeof(value));
      at += sizeof(value);
    }
    at_ = at;
  }

  // The same of numbers that have as many bytes as they need.
  template <typename From, typename Get>
  void VarintColumn(int field, const std::vector<From>& from, Get get) {
    if (from.empty()) return;
    Nested(field, [&] {
      Reserve(from.size() * kHeadBytesMax);
      uint8_t* at = at_;
      for (const From& item : from) at = CodedOutputStream::WriteVarint32ToArray(get(item), at);
      at_ = at;
    });
  }

  // A message, or a column, that `write` writes.
  template <typename Write>
  void Nested(int field, Write write) {
    Reserve(2 * kHeadBytesMax);
    at_ = CodedOutputStream::WriteVarint32ToArray(TagOf(field, kLengthDelimited), at_);
    const size_t head = size();
    // How much its length takes is known in the end: what has been written moves there.
    at_ += kHeadBytesMax;
    write();
    const size_t bytes = size() - head - kHeadBytesMax;
    At(head);
    uint8_t* const from = at_ + kHeadBytesMax;
    at_ = CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(bytes), at_);
    std::memmove(at_, from, bytes);
    at_ += bytes;
  }

 private:
  size_t size() const {
    return static_cast<size_t>(at_ - reinterpret_cast<const uint8_t*>(to_->data()));
  }
  void At(size_t offset) { at_ = reinterpret_cast<uint8_t*>(to_->data()) + offset; }
  void Reserve(size_t bytes) {
    const size_t offset = size();
    if (to_->size() - offset >= bytes) return;
    to_->resize(2 * (offset + bytes));
    At(offset);
  }

  std::string* const to_;
  uint8_t* at_ = nullptr;
};

static_assert(v1::Level_MAX < 0x80 && v1::Action_MAX < 0x80);
uint8_t ByteOf(Level level) { return static_cast<uint8_t>(LevelToProto(level)); }
uint8_t ByteOf(Action action) { return static_cast<uint8_t>(ActionToProto(action)); }

using Heads = std::vector<HeadCertificate>;

// Columns that most replies do without are written only if they say something.
void WriteOptional(const Heads& heads, Writer* to) {
  using C = v1::Certificates;
  using Head = HeadCertificate;
  bool has_failure = false, has_error = false, has_samples = false;
  for (const Head& head : heads) {
    has_failure |= head.failure_probability > 0.0;
    has_error |= !std::isinf(head.output_error_upper);
    has_samples |= (head.keys_sampled | head.rows_sampled) != 0;
  }
  if (has_failure) {
    to->Column<double>(C::kFailureProbabilityFieldNumber, heads,
                       [](const Head& head) { return head.failure_probability; });
  }
  if (has_error) {
    to->Column<float>(C::kOutputErrorUpperFieldNumber, heads,
                      [](const Head& head) { return RoundUpToFloat(head.output_error_upper); });
    to->Column<float>(C::kOutputErrorRelativeUpperFieldNumber, heads,
                      [](const Head& head) { return RoundUpToFloat(RelativeOutputError(head)); });
    to->Column<float>(C::kValueNormLowerFieldNumber, heads,
                      [](const Head& head) { return RoundDownToFloat(head.value_norm_lower); });
  }
  if (has_samples) {
    to->VarintColumn(C::kKeysSampledFieldNumber, heads,
                     [](const Head& head) { return head.keys_sampled; });
    to->VarintColumn(C::kRowsSampledFieldNumber, heads,
                     [](const Head& head) { return head.rows_sampled; });
  }
}

void WriteCertificates(const Heads& heads, Writer* to) {
  using C = v1::Certificates;
  using Head = HeadCertificate;
  to->Column<uint8_t>(C::kLevelFieldNumber, heads,
                      [](const Head& head) { return ByteOf(head.level); });
  to->Column<uint8_t>(C::kActionFieldNumber, heads,
                      [](const Head& head) { return ByteOf(head.action); });
  to->Column<uint8_t>(C::kMetFieldNumber, heads,
                      [](const Head& head) { return uint8_t{head.met}; });
  to->Column<float>(C::kDroppedMassUpperFieldNumber, heads,
                    [](const Head& head) { return RoundUpToFloat(head.dropped_mass_upper.value); });
  to->Column<float>(C::kDroppedMassLowerFieldNumber, heads, [](const Head& head) {
    return RoundDownToFloat(head.dropped_mass_lower.value);
  });
  to->Column<double>(C::kLogKeptLowerFieldNumber, heads,
                     [](const Head& head) { return head.log_kept_lower.value; });
  to->Column<double>(C::kLogKeptUpperFieldNumber, heads,
                     [](const Head& head) { return head.log_kept_upper.value; });
  to->Column<double>(C::kLogDroppedLowerFieldNumber, heads,
                     [](const Head& head) { return head.log_dropped_lower.value; });
  to->Column<double>(C::kLogDroppedUpperFieldNumber, heads,
                     [](const Head& head) { return head.log_dropped_upper.value; });
  to->Column<float>(C::kDroppedMassEstimateFieldNumber, heads,
                    [](const Head& head) { return head.dropped_mass_estimate; });
  WriteOptional(heads, to);
}

// A column that says nothing of any KV head (all negative) is left out.
template <typename Report>
void WriteStated(int field, const std::vector<Report>& reports, float Report::*member, Writer* to) {
  const auto says = [member](const Report& report) { return report.*member >= 0.0F; };
  if (std::none_of(reports.begin(), reports.end(), says)) return;
  to->Column<float>(field, reports, [member](const Report& report) { return report.*member; });
}

void WriteGroups(const AttendRowResult& from, Writer* to) {
  using G = v1::GroupReports;
  const std::vector<GroupReport>& groups = from.groups;
  to->Column<uint8_t>(G::kActionFieldNumber, groups,
                      [](const GroupReport& group) { return ByteOf(group.action); });
  to->Column<uint8_t>(G::kScannedFieldNumber, groups,
                      [](const GroupReport& group) { return uint8_t{group.scanned}; });
  to->VarintColumn(G::kTokensReadFieldNumber, groups,
                   [](const GroupReport& group) { return group.tokens_read; });
  to->VarintColumn(G::kTokensScannedFieldNumber, groups,
                   [](const GroupReport& group) { return group.tokens_scanned; });
  to->Column<float>(G::kSimilarityFieldNumber, groups,
                    [](const GroupReport& group) { return group.similarity; });
  to->VarintColumn(G::kKeysSampledFieldNumber, groups,
                   [](const GroupReport& group) { return group.keys_sampled; });
  to->VarintColumn(G::kRowsSampledFieldNumber, groups,
                   [](const GroupReport& group) { return group.rows_sampled; });
  const std::vector<AssumedMasses>& assumed = from.assumed;
  WriteStated(G::kAssumedCisExcessMassFieldNumber, assumed, &AssumedMasses::cis_excess, to);
  WriteStated(G::kAssumedPsawDroppedMassFieldNumber, assumed, &AssumedMasses::psaw_dropped, to);
  WriteStated(G::kAssumedEtfExcessMassFieldNumber, assumed, &AssumedMasses::etf_excess, to);
  WriteStated(G::kKeyNormMaxFieldNumber, groups, &GroupReport::key_norm_max, to);
  WriteStated(G::kSharingEstimateFieldNumber, groups, &GroupReport::sharing_estimate, to);
  WriteStated(G::kQueryDistanceFieldNumber, groups, &GroupReport::query_distance, to);
}

void WriteDeferred(const DeferredMasses& masses, Writer* to) {
  using D = v1::DeferredMasses;
  to->Number(D::kPositionFieldNumber, masses.position);
  to->Number(D::kQueryCountFieldNumber, masses.query_count);
  to->Column<float>(D::kDroppedMassUpperFieldNumber, masses.heads,
                    [](const DeferredMass& mass) { return RoundUpToFloat(mass.upper.value); });
  to->Column<float>(D::kDroppedMassLowerFieldNumber, masses.heads,
                    [](const DeferredMass& mass) { return RoundDownToFloat(mass.lower.value); });
}

}  // namespace

void EncodeRow(const AttendCallRow& row, const AttendRowResult& from, std::string* to) {
  using R = v1::AttendRowResult;
  if (!from.status.ok()) {
    R failed;
    RowToProto(row, from, &failed);
    failed.SerializeToString(to);
    return;
  }
  // In the order of the field numbers, as protobuf writes them.
  Writer writer(to);
  writer.Number(R::kAttendedTokensFieldNumber, from.attended_length);
  writer.Number(R::kSelectorFieldNumber, SelectorToProto(from.selector));
  writer.Nested(R::kGroupsFieldNumber, [&] { WriteGroups(from, &writer); });
  writer.Nested(R::kCertificatesFieldNumber,
                [&] { WriteCertificates(from.certificates, &writer); });
  for (const std::vector<uint32_t>& positions : from.selected) {
    writer.Nested(R::kSelectedFieldNumber, [&] {
      writer.VarintColumn(v1::SelectedPositions::kPositionsFieldNumber, positions,
                          [](uint32_t position) { return position; });
    });
  }
  writer.Number(R::kGenerationFieldNumber, row.generation);
  for (const DeferredMasses& masses : from.deferred) {
    writer.Nested(R::kDeferredFieldNumber, [&] { WriteDeferred(masses, &writer); });
  }
  writer.Finish();
}

}  // namespace kvservice
