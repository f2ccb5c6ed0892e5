#include "kvservice/server/receive_stream.h"

#include <cassert>
#include <utility>
#include <variant>

#include "kvservice/error.h"
#include "kvservice/server/convert_transfer.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

// The others are answered by their success: the next of them may be on its way already.
bool IsAnswered(const TransferPart& part) {
  return !std::holds_alternative<TransferSlices>(part) &&
         !std::holds_alternative<TransferSeeds>(part);
}

}  // namespace

void ReceiveStream::Listen(const ReceiveMethod* method, grpc::ServerCompletionQueue* queue) {
  auto* const stream = new ReceiveStream(method, queue);
  method->request(&stream->context_, &stream->stream_, queue, static_cast<CompletionTag*>(stream));
}

ReceiveStream::~ReceiveStream() {
  if (state_ != State::kListening) method_->host.in_flight->Leave(reserved_bytes_);
}

void ReceiveStream::Complete(bool ok) {
  switch (state_) {
    case State::kListening:
      if (ok) return Arrive();
      break;
    case State::kReading:
      return ok ? Take() : Finish(absl::OkStatus());
    case State::kTaking:
      assert(false && "no event is asked for while the engine works");
      break;
    case State::kWriting:
      return ok ? Read() : Finish(absl::OkStatus());
    case State::kFinishing:
      break;
  }
  delete this;
}

void ReceiveStream::Arrive() {
  state_ = State::kReading;
  method_->host.in_flight->Enter();
  arrived_ns_ = method_->host.clock->SteadyNowNs();
  Listen(method_, queue_);
  caller_ = method_->host.gate->Identify(context_);
  const absl::Status status = method_->host.gate->Admit(method_->access, caller_);
  if (!status.ok()) return Finish(status);
  Read();
}

void ReceiveStream::Read() {
  state_ = State::kReading;
  stream_.Read(&buffer_, static_cast<CompletionTag*>(this));
}

void ReceiveStream::Take() {
  state_ = State::kTaking;
  absl::StatusOr<TransferPart> part = NextPart();
  if (!part.ok()) return Finish(part.status());
  const bool is_answered = IsAnswered(*part);
  has_begun_ = true;
  method_->engine->Receive(caller_.tenant, attempt_, *std::move(part),
                           [this, is_answered](absl::StatusOr<ReceiveReply> reply) {
                             Taken(std::move(reply), is_answered);
                           });
}

absl::StatusOr<TransferPart> ReceiveStream::NextPart() {
  const size_t bytes = buffer_.Length();
  if (!method_->host.in_flight->Reserve(bytes)) return RequestBytesExhausted();
  reserved_bytes_ = bytes;
  v1::ReceiveRequest message;
  const absl::Status parsed = ParseMessage(&buffer_, &message);
  if (!parsed.ok()) return parsed;
  absl::StatusOr<TransferPart> part = PartFromProto(&message);
  if (part.ok() && has_begun_ == std::holds_alternative<TransferBegin>(*part)) {
    return InvalidField("begin", "TRANSFER_OUT_OF_ORDER",
                        "begin is the first message of a stream, and no other");
  }
  return part;
}

void ReceiveStream::Taken(absl::StatusOr<ReceiveReply> reply, bool is_answered) {
  method_->host.in_flight->Release(std::exchange(reserved_bytes_, 0));
  if (!reply.ok()) return Finish(reply.status());
  if (!is_answered) return Read();
  attempt_ = reply->attempt;
  v1::ReceiveResponse response;
  ReplyToProto(*reply, &response);
  state_ = State::kWriting;
  stream_.Write(SerializeMessage(response), static_cast<CompletionTag*>(this));
}

void ReceiveStream::Finish(const absl::Status& status) {
  state_ = State::kFinishing;
  method_->host.gate->Ended({.method = method_->access,
                             .caller = caller_,
                             .status = status,
                             .duration_ns = method_->host.clock->SteadyNowNs() - arrived_ns_});
  stream_.Finish(ToGrpcStatus(status, &context_), static_cast<CompletionTag*>(this));
}

}  // namespace kvservice
