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

bool TakeNumber(const Field& field, uint64_t* number) {
  *number = field.varint;
  return field.is_varint;
}

bool SplitRegion(std::string_view message, TensorParts* tensor) {
  using R = v1::TensorRegion;
  FieldReader reader(message);
  Field field;
  while (reader.Next(&field)) {
    bool taken = true;
    switch (field.number) {
      case R::kOffsetBytesFieldNumber:
        taken = TakeNumber(field, &tensor->offset_bytes);
        break;
      case R::kLengthBytesFieldNumber:
        taken = TakeNumber(field, &tensor->length_bytes);
        break;
      default:
        break;
    }
    if (!taken) return false;
  }
  return reader.is_done();
}

// Several of a field would be merged: once is enough for what servers write.
bool TakeShape(const Field& field, TensorParts* tensor) {
  if (!field.is_length_delimited || !tensor->shape.empty()) return false;
  VarintReader extents{Column(field.value)};
  while (extents.has_more()) {
    tensor->shape.push_back(static_cast<int64_t>(extents.Next64()));
  }
  return extents.is_done();
}

bool TakeRegion(const Field& field, TensorParts* tensor) {
  if (!field.is_length_delimited || tensor->has_region) return false;
  tensor->has_region = true;
  return SplitRegion(field.value, tensor);
}

bool TakeTensorField(const Field& field, TensorParts* tensor) {
  using T = v1::Tensor;
  uint64_t number = 0;
  switch (field.number) {
    case T::kDtypeFieldNumber:
      if (!TakeNumber(field, &number)) return false;
      tensor->dtype = static_cast<int>(number);
      return true;
    case T::kShapeFieldNumber:
      return TakeShape(field, tensor);
    case T::kDataFieldNumber:
      tensor->data = field.value;
      return field.is_length_delimited;
    case T::kRegionFieldNumber:
      return TakeRegion(field, tensor);
    default:
      return true;
  }
}

bool SplitTensor(const Field& tensor_field, TensorParts* tensor) {
  const bool is_first =
      tensor->dtype == 0 && tensor->shape.empty() && tensor->data.empty() && !tensor->has_region;
  if (!tensor_field.is_length_delimited || !is_first) return false;
  FieldReader reader(tensor_field.value);
  Field field;
  while (reader.Next(&field)) {
    if (!TakeTensorField(field, tensor)) return false;
  }
  return reader.is_done();
}

// Of a response, but for the rows. What is unknown is passed by.
bool TakeField(const Field& field, ReplyParts* parts) {
  using R = v1::AttendResponse;
  switch (field.number) {
    case R::kStepIdFieldNumber:
      return TakeNumber(field, &parts->step_id);
    case R::kCallNumberFieldNumber:
      return TakeNumber(field, &parts->call_number);
    case R::kQueueNsFieldNumber:
      return TakeNumber(field, &parts->queue_ns);
    case R::kServiceNsFieldNumber:
      return TakeNumber(field, &parts->service_ns);
    case R::kEpochFieldNumber:
      parts->epoch = field.value;
      return field.is_length_delimited;
    case R::kDrawSecretIdFieldNumber:
      if (field.value.size() != sizeof(uint64_t) || field.is_length_delimited) return false;
      parts->draw_secret_id = Column(field.value).At<uint64_t>(0);
      return true;
    case R::kErrorFieldNumber:
      return false;
    case R::kLseFieldNumber:
      return SplitTensor(field, &parts->lse);
    case R::kOutFieldNumber:
      return SplitTensor(field, &parts->out);
    default:
      return true;
  }
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

bool SplitReply(std::string_view message, google::protobuf::Arena* arena, ReplyParts* parts) {
  std::string rest;
  FieldReader reader(message);
  Field field;
  while (reader.Next(&field)) {
    if (field.number != v1::AttendResponse::kResultsFieldNumber) {
      if (!TakeField(field, parts)) return false;
      continue;
    }
    if (!field.is_length_delimited) return false;
    RowParts* const row = &parts->rows.emplace_back();
    rest.clear();
    if (!SplitRow(field.value, row, &rest)) return false;
    if (rest.empty()) continue;
    auto* const message_of_rest =
        google::protobuf::Arena::CreateMessage<v1::AttendRowResult>(arena);
    if (!message_of_rest->ParseFromString(rest)) return false;
    row->rest = message_of_rest;
    // Nobody would look at what a row that has failed says beside.
    if (row->has_failed() && !(row->groups.empty() && row->certificates.empty())) return false;
  }
  return reader.is_done();
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
