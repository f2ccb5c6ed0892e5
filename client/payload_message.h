// Messages with tensors, made without a copy of the tensors in between: what protobuf would write
// had the payloads been put into the message, but with the tensors at its end. Inside the library
// only. One thread.

#ifndef KVSERVICE_CLIENT_PAYLOAD_MESSAGE_H_
#define KVSERVICE_CLIENT_PAYLOAD_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/container/inlined_vector.h"
#include "client/tensor.h"
#include "google/protobuf/message_lite.h"

namespace kvservice::client {

class PayloadMessage {
 public:
  // `message` is borrowed and has none of the tensors' fields.
  explicit PayloadMessage(const google::protobuf::MessageLite* message);

  // A field of type Tensor; its number is at most 15, its payload is borrowed.
  void Add(int field_number, const TensorView& tensor);

  size_t bytes() const { return bytes_; }
  // To [bytes()].
  void Write(uint8_t* to) const;

 private:
  struct Field {
    int number = 0;
    // The field's message up to the payload.
    std::string head;
    // Of that message.
    size_t bytes = 0;
    absl::Span<const std::byte> payload;
  };

  const google::protobuf::MessageLite* const message_;
  absl::InlinedVector<Field, 3> fields_;
  size_t bytes_ = 0;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_PAYLOAD_MESSAGE_H_
