#include "tests/server/raw_call.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/slice.h>
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

// Runs the queue until the operation just started has ended; false when gRPC says it failed.
bool Finish(grpc::CompletionQueue* queue) {
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue->Next(&tag, &ok));
  return ok;
}

}  // namespace

grpc::ByteBuffer BytesOf(const std::string& text) {
  const grpc::Slice slice(text);
  return {&slice, 1};
}

grpc::ByteBuffer BytesOf(const google::protobuf::MessageLite& message) {
  return BytesOf(message.SerializeAsString());
}

grpc::ByteBuffer ManyMebibytes(size_t slice_count) {
  const grpc::Slice mebibyte(std::string(size_t{1} << 20, 'x'));
  const std::vector<grpc::Slice> slices(slice_count, mebibyte);
  return {slices.data(), slices.size()};
}

std::string TextOf(const grpc::ByteBuffer& bytes) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(bytes.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& slice : slices) {
    text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return text;
}

grpc::Status CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const grpc::ByteBuffer& request, std::string* reply) {
  grpc::GenericStub stub(channel);
  const std::unique_ptr<grpc::ClientContext> context = NewContext();
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(context.get(), method, &queue);
  call->StartCall(nullptr);
  if (Finish(&queue)) {
    call->WriteLast(request, grpc::WriteOptions(), nullptr);
    Finish(&queue);
  }
  bool first = true;
  for (;;) {
    grpc::ByteBuffer response;
    call->Read(&response, nullptr);
    if (!Finish(&queue)) break;
    if (std::exchange(first, false) && reply != nullptr) *reply = TextOf(response);
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  Finish(&queue);
  queue.Shutdown();
  return status;
}

}  // namespace kvservice::testing
