#include "kvservice/server/append_stream.h"

#include <cassert>
#include <utility>

#include "kvservice/error.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/status.h"

namespace kvservice {

void AppendStream::Listen(const AppendMethod* method, grpc::ServerCompletionQueue* queue) {
  auto* const stream = new AppendStream(method, queue);
  method->request(&stream->context_, &stream->reader_, queue, static_cast<CompletionTag*>(stream));
}

AppendStream::~AppendStream() {
  if (state_ != State::kListening) method_->host.in_flight->Leave(reserved_bytes_);
}

void AppendStream::Complete(bool ok) {
  switch (state_) {
    case State::kListening:
      if (ok) return Arrive();
      break;
    case State::kReading:
      return ok ? Apply() : Close();
    case State::kApplying:
      assert(false && "no event is asked for while the engine works");
      break;
    case State::kReplying:
      break;
  }
  delete this;
}

void AppendStream::Arrive() {
  state_ = State::kReading;
  method_->host.in_flight->Enter();
  arrived_ns_ = method_->host.clock->SteadyNowNs();
  Listen(method_, queue_);
  caller_ = method_->host.gate->Identify(context_);
  const absl::Status status = method_->host.gate->Admit(method_->access, caller_);
  if (!status.ok()) return Fail(status);
  Read();
}

void AppendStream::Read() {
  state_ = State::kReading;
  reader_.Read(&buffer_, static_cast<CompletionTag*>(this));
}

void AppendStream::Apply() {
  state_ = State::kApplying;
  absl::StatusOr<AppendCall> call = NextCall();
  if (!call.ok()) return Fail(call.status());
  method_->engine->Append(*std::move(call), [this](absl::StatusOr<AppendResult> result) {
    Applied(std::move(result));
  });
}

absl::StatusOr<AppendCall> AppendStream::NextCall() {
  const size_t bytes = buffer_.Length();
  if (!method_->host.in_flight->Reserve(bytes)) return RequestBytesExhausted();
  reserved_bytes_ = bytes;
  const absl::Status parsed = ParseMessage(&buffer_, &message_);
  if (!parsed.ok()) return parsed;
  absl::StatusOr<AppendCall> call = AppendFromProto(message_, caller_.tenant, nullptr);
  if (call.ok()) sequence_ = call->id;
  return call;
}

void AppendStream::Applied(absl::StatusOr<AppendResult> result) {
  method_->host.in_flight->Release(std::exchange(reserved_bytes_, 0));
  if (!result.ok()) return Fail(result.status());
  response_.set_message_count(response_.message_count() + 1);
  if (result->duplicate) response_.set_duplicate_count(response_.duplicate_count() + 1);
  Read();
}

void AppendStream::Close() {
  // The end of the stream, or of the connection: then the reply goes nowhere, and sending it ends
  // the call all the same.
  if (response_.message_count() == 0) {
    return Fail(InvalidField("handle", "APPEND_EMPTY", "the stream ended without a message"));
  }
  state_ = State::kApplying;
  method_->engine->Get(caller_.tenant, sequence_,
                       [this](const absl::StatusOr<SequenceInfo>& info) { Reply(info); });
}

void AppendStream::Reply(const absl::StatusOr<SequenceInfo>& info) {
  if (!info.ok()) return Fail(info.status());
  SequenceToProto(*info, response_.mutable_sequence());
  const grpc::ByteBuffer bytes = SerializeMessage(response_);
  Ended(absl::OkStatus());
  reader_.Finish(bytes, grpc::Status::OK, static_cast<CompletionTag*>(this));
}

void AppendStream::Fail(const absl::Status& status) {
  Ended(status);
  reader_.FinishWithError(ToGrpcStatus(status, &context_), static_cast<CompletionTag*>(this));
}

void AppendStream::Ended(const absl::Status& status) {
  state_ = State::kReplying;
  method_->host.gate->Ended({.method = method_->access,
                             .caller = caller_,
                             .status = status,
                             .duration_ns = method_->host.clock->SteadyNowNs() - arrived_ns_});
}

}  // namespace kvservice
