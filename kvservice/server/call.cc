#include "kvservice/server/call.h"

#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/proto_buffer_writer.h>
#include <grpcpp/support/slice.h>

#include <cassert>
#include <vector>

#include "google/protobuf/message_lite.h"
#include "kvservice/error.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

constexpr uint32_t kOverloadRetryDelayMs = 50;

}  // namespace

absl::Status MessageMalformed(const google::protobuf::MessageLite& message) {
  const std::string type = message.GetTypeName();
  return MakeError(absl::StatusCode::kInvalidArgument, "the message is not a valid " + type,
                   {.reason = "MESSAGE_MALFORMED", .field = {}, .metadata = {{"type", type}}});
}

absl::Status ParseMessage(grpc::ByteBuffer* buffer, google::protobuf::MessageLite* message) {
  bool parsed = false;
  {
    grpc::ProtoBufferReader reader(buffer);
    parsed = reader.status().ok() && message->ParseFromZeroCopyStream(&reader);
  }
  buffer->Clear();
  return parsed ? absl::OkStatus() : MessageMalformed(*message);
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return {&slice, 1};
}

absl::Status RequestBytesExhausted() {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   "the requests being served occupy all the memory they may",
                   {.reason = "OVERLOADED",
                    .field = {},
                    .metadata = {},
                    .retry_delay_ms = kOverloadRetryDelayMs});
}

UnaryCallBase::~UnaryCallBase() {
  if (state_ != State::kListening) host_->in_flight->Leave(reserved_bytes_);
}

void UnaryCallBase::Complete(bool ok) {
  // While listening, !ok means that the server shuts down; while replying, that the client is gone.
  // Neither leaves anything to do.
  if (state_ == State::kReplying || !ok) {
    delete this;
    return;
  }
  assert(state_ == State::kListening);
  state_ = State::kRunning;
  host_->in_flight->Enter();
  arrived_ns_ = host_->clock->SteadyNowNs();
  ListenForNext();
  const absl::Status status = Prepare();
  if (status.ok()) {
    Run();
  } else {
    Finish(std::unique_ptr<UnaryCallBase>(this), status, grpc::ByteBuffer());
  }
}

absl::Status UnaryCallBase::Prepare() {
  caller_ = host_->gate->Identify(wire_.context);
  if (absl::Status admitted = host_->gate->Admit(*method_, caller_); !admitted.ok()) {
    return admitted;
  }
  const size_t bytes = wire_.request.Length();
  if (!host_->in_flight->Reserve(bytes)) return RequestBytesExhausted();
  reserved_bytes_ = bytes;
  return ParseMessage(&wire_.request, request_message());
}

void UnaryCallBase::Finish(std::unique_ptr<UnaryCallBase> call, const absl::Status& status,
                           const grpc::ByteBuffer& response) {
  UnaryCallBase* const tag = call.release();
  tag->state_ = State::kReplying;
  tag->host_->gate->Ended({.method = *tag->method_,
                           .caller = tag->caller_,
                           .status = status,
                           .duration_ns = tag->host_->clock->SteadyNowNs() - tag->arrived_ns_,
                           .subject = tag->subject_});
  // The queue's thread may delete the call as soon as this starts the last operation.
  auto* const event = static_cast<CompletionTag*>(tag);
  if (status.ok()) {
    tag->wire_.responder.Finish(response, grpc::Status::OK, event);
  } else {
    tag->wire_.responder.FinishWithError(ToGrpcStatus(status, &tag->wire_.context), event);
  }
}

}  // namespace kvservice
