#include "client/payload_message.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "client/requests.h"
#include "google/protobuf/io/coded_stream.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice::client {
namespace {

using google::protobuf::io::CodedOutputStream;

// Wire type 2: a length and as many bytes follow. One byte up to field 15.
uint8_t LengthDelimitedTag(int field_number) {
  return static_cast<uint8_t>(static_cast<uint32_t>(field_number) << 3 | 2);
}

// Bytes of tag and length before `size` bytes.
size_t HeadBytes(size_t size) { return 1 + CodedOutputStream::VarintSize64(size); }

uint8_t* WriteHead(int field_number, size_t size, uint8_t* to) {
  *to = LengthDelimitedTag(field_number);
  return CodedOutputStream::WriteVarint64ToArray(size, to + 1);
}

}  // namespace

PayloadMessage::PayloadMessage(const google::protobuf::MessageLite* message)
    : message_(message), bytes_(message->ByteSizeLong()) {}

void PayloadMessage::Add(int field_number, const TensorView& tensor) {
  Field field;
  field.number = field_number;
  v1::Tensor head;
  DescribeTensor(tensor, tensor.token_count, &head);
  field.head = head.SerializeAsString();
  field.payload = tensor.bytes;
  field.bytes = field.head.size() + HeadBytes(tensor.bytes.size()) + tensor.bytes.size();
  bytes_ += HeadBytes(field.bytes) + field.bytes;
  fields_.push_back(std::move(field));
}

void PayloadMessage::Write(uint8_t* to) const {
  to = message_->SerializeWithCachedSizesToArray(to);
  for (const Field& field : fields_) {
    to = WriteHead(field.number, field.bytes, to);
    to = std::copy(field.head.begin(), field.head.end(), to);
    to = WriteHead(v1::Tensor::kDataFieldNumber, field.payload.size(), to);
    std::memcpy(to, field.payload.data(), field.payload.size());
    to += field.payload.size();
  }
}

}  // namespace kvservice::client
