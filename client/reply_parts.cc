#include "client/reply_parts.h"

#include <limits>
#include <string>

namespace kvservice::client {
namespace {

// The low bits of a tag.
constexpr uint32_t kVarint = 0, kEightBytes = 1, kLengthDelimited = 2, kFourBytes = 5;
constexpr unsigned kWireTypeBits = 3;

// Of tags and lengths.
constexpr unsigned kHeadBytesMax = 5;

struct Field {
  uint32_t number = 0;
  bool is_length_delimited = false;
  // Of such a field, without tag and length.
  std::string_view value;
  bool is_varint = false;
  uint64_t varint = 0;
  // With them.
  std::string_view whole;
};

}  // namespace

// Takes a message's fields, one after the other.
class FieldReader {
 public:
  explicit FieldReader(std::string_view message) : rest_(Column(message)) {}

  // False at the end, and where the bytes are no field.
  bool Next(Field* field) {
    if (rest_.at_ == rest_.end_) return false;
    rest_.is_sound_ = Take(field);
    return rest_.is_sound_;
  }
  // All have been taken, and there was nothing else.
  bool is_done() const { return rest_.is_done(); }

 private:
  bool Take(Field* field) {
    const char* const begin = rest_.at_;
    uint64_t tag = 0;
    if (!rest_.Read(kHeadBytesMax, &tag) || tag > std::numeric_limits<uint32_t>::max()) {
      return false;
    }
    field->number = static_cast<uint32_t>(tag) >> kWireTypeBits;
    const uint32_t type = static_cast<uint32_t>(tag) & ((1U << kWireTypeBits) - 1);
    field->is_length_delimited = type == kLengthDelimited;
    field->is_varint = type == kVarint;
    uint64_t bytes = 0;
    if (!ReadSize(type, &field->varint, &bytes) ||
        bytes > static_cast<uint64_t>(rest_.end_ - rest_.at_)) {
      return false;
    }
    field->value = {rest_.at_, static_cast<size_t>(bytes)};
    rest_.at_ += bytes;
    field->whole = {begin, static_cast<size_t>(rest_.at_ - begin)};
    return field->number != 0;
  }

  // Of the value that follows; that of a varint is read at once.
  bool ReadSize(uint32_t type, uint64_t* varint, uint64_t* bytes) {
    switch (type) {
      case kVarint:
        *bytes = 0;
        return rest_.Read(VarintReader::kVarintBytesMax, varint);
      case kEightBytes:
        *bytes = 8;
        return true;
      case kFourBytes:
        *bytes = 4;
        return true;
      case kLengthDelimited:
        return rest_.Read(kHeadBytesMax, bytes);
      default:
        return false;
    }
  }

  VarintReader rest_;
};

namespace {

// Several messages of one field would have to be merged.
bool TakePart(const Field& field, std::string_view* part) {
  if (!field.is_length_delimited || !part->empty()) return false;
  *part = field.value;
  return true;
}

// `rest` is what is left of the row, for protobuf.
bool SplitRow(std::string_view message, RowParts* parts, std::string* rest) {
  using R = v1::AttendRowResult;
  FieldReader reader(message);
  Field field;
  while (reader.Next(&field)) {
    if (field.number == R::kGroupsFieldNumber) {
      if (!TakePart(field, &parts->groups)) return false;
    } else if (field.number == R::kCertificatesFieldNumber) {
      if (!TakePart(field, &parts->certificates)) return false;
    } else if (field.is_varint && field.number == R::kAttendedTokensFieldNumber) {
      parts->attended_tokens = static_cast<uint32_t>(field.varint);
    } else if (field.is_varint && field.number == R::kSelectorFieldNumber) {
      parts->selector = static_cast<int>(field.varint);
    } else if (field.is_varint && field.number == R::kGenerationFieldNumber) {
      parts->generation = field.varint;
    } else {
      rest->append(field.whole);
    }
  }
  return reader.is_done();
}

}  // namespace

bool SplitReply(std::string_view message, v1::AttendResponse* response,
                std::vector<RowParts>* parts) {
  std::vector<std::string_view> rows;
  std::string rest;
  FieldReader reader(message);
  Field field;
  while (reader.Next(&field)) {
    if (field.number != v1::AttendResponse::kResultsFieldNumber) {
      rest.append(field.whole);
    } else if (field.is_length_delimited) {
      rows.push_back(field.value);
    } else {
      return false;
    }
  }
  if (!reader.is_done() || !response->ParseFromString(rest)) return false;
  parts->resize(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    rest.clear();
    if (!SplitRow(rows[i], &(*parts)[i], &rest)) return false;
    if (rest.empty()) continue;
    v1::AttendRowResult* const row = response->add_results();
    if (!row->ParseFromString(rest)) return false;
    (*parts)[i].rest = row;
  }
  return true;
}

bool Columns::Read(std::string_view message) {
  present_ = 0;
  FieldReader reader(message);
  Field field;
  while (reader.Next(&field)) {
    if (field.number >= kEnd) continue;
    if (!field.is_length_delimited || !(*this)[field.number].empty()) return false;
    columns_[field.number] = Column(field.value);
    present_ |= 1U << field.number;
  }
  return reader.is_done();
}

}  // namespace kvservice::client
