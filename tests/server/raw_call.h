// Calls with bytes instead of messages, for what no well-behaved client would send.

#ifndef KVSERVICE_TESTS_SERVER_RAW_CALL_H_
#define KVSERVICE_TESTS_SERVER_RAW_CALL_H_

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include <memory>
#include <string>

#include "google/protobuf/message_lite.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace kvservice::testing {

grpc::ByteBuffer BytesOf(const std::string& text);
grpc::ByteBuffer BytesOf(const google::protobuf::MessageLite& message);
// `slice_count` times one and the same MiB: costs a MiB of memory, whatever its length.
grpc::ByteBuffer ManyMebibytes(size_t slice_count);

// Sends `request` as the only message of "/package.Service/Method", whatever its kind, and waits
// for the end of the call. `reply` gets the bytes of the first message that came back.
grpc::Status CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const grpc::ByteBuffer& request, std::string* reply = nullptr);

std::string TextOf(const grpc::ByteBuffer& bytes);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_RAW_CALL_H_
