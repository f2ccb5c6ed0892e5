#include "kvservice/server/attend_stream.h"

#include <utility>

#include "kvservice/server/attend_reply.h"
#include "kvservice/server/attend_run.h"
#include "kvservice/server/server.h"
#include "kvservice/server/status.h"

namespace kvservice {

struct AttendStream::Call {
  grpc::ByteBuffer bytes;
  size_t reserved_bytes = 0;
  Caller caller;
  // Else nobody can tell whose answer this would be.
  bool is_parsed = true;
  v1::AttendRequest request;
  AttendRun run;
};

void AttendStream::Listen(const AttendStreamMethod* method, grpc::ServerCompletionQueue* queue) {
  auto* const stream = new AttendStream(method, queue);
  method->request(&stream->context_, &stream->stream_, queue, stream->arrived_.tag());
}

AttendStream::~AttendStream() {
  if (is_open_) method_->host.calls.in_flight->LeaveStream();
}

void AttendStream::Arrived(bool ok) {
  if (!ok) {
    delete this;
    return;
  }
  const CallHost& calls = method_->host.calls;
  is_open_ = true;
  calls.in_flight->EnterStream();
  arrived_ns_ = calls.clock->SteadyNowNs();
  Listen(method_, queue_);
  const Caller caller = calls.gate->Identify(context_);
  const absl::Status status = calls.gate->Admit(method_->access, caller);
  if (!status.ok()) {
    calls.gate->Ended({.method = method_->access, .caller = caller, .status = status});
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!status.ok()) EndReading(status);
  Proceed();
}

void AttendStream::Read(bool ok) {
  auto call = std::make_unique<Call>();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_reading_ = false;
    if (!ok) EndReading(absl::OkStatus());
    if (has_ended_) {
      Proceed();
      return;
    }
    std::swap(call->bytes, message_);
    ++call_count_;
    Proceed();
  }
  const absl::Status status = Begin(call.get());
  if (!status.ok()) {
    Answer(std::move(call), status);
    return;
  }
  Call* const owned_by_done = call.release();
  owned_by_done->run.call.done = [this, owned_by_done](const absl::Status& done) {
    Answer(std::unique_ptr<Call>(owned_by_done), done);
  };
  method_->host.engine->Attend(&owned_by_done->run.call);
}

absl::Status AttendStream::Begin(Call* call) {
  const CallHost& calls = method_->host.calls;
  calls.in_flight->Enter();
  call->run.arrived_ns = calls.clock->SteadyNowNs();
  const size_t bytes = call->bytes.Length();
  if (!calls.in_flight->Reserve(bytes)) return RequestBytesExhausted();
  call->reserved_bytes = bytes;
  if (absl::Status parsed = ParseMessage(&call->bytes, &call->request); !parsed.ok()) {
    call->is_parsed = false;
    const std::lock_guard<std::mutex> lock(mutex_);
    EndReading(parsed);
    return parsed;
  }
  // A stream may last long enough for its caller to lose what it may do.
  call->caller = calls.gate->Identify(context_);
  if (absl::Status admitted = calls.gate->Admit(method_->access, call->caller); !admitted.ok()) {
    return admitted;
  }
  return PrepareAttend(call->request, method_->host.policies->now(), call->caller.tenant, nullptr,
                       &call->run);
}

void AttendStream::Answer(std::unique_ptr<Call> call, const absl::Status& status) {
  v1::AttendResponse response;
  grpc::ByteBuffer bytes;
  if (status.ok()) {
    DescribeAttend(call->request, call->run, method_->host.calls, &response);
    bytes = SerializeAttendReply(&response, &call->run);
  } else {
    response.set_step_id(call->request.step_id());
    *response.mutable_error() = StatusToProto(status);
    bytes = SerializeMessage(response);
  }
  const CallHost& calls = method_->host.calls;
  calls.gate->Ended({.method = method_->access,
                     .caller = call->caller,
                     .status = status,
                     .duration_ns = calls.clock->SteadyNowNs() - call->run.arrived_ns});
  const size_t reserved_bytes = call->reserved_bytes;
  const bool is_answered = call->is_parsed;
  call.reset();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    --call_count_;
    if (is_answered && !is_broken_) answers_.push_back(std::move(bytes));
    Proceed();
  }
  // The stream may be gone.
  calls.in_flight->Leave(reserved_bytes);
}

void AttendStream::EndReading(const absl::Status& status) {
  has_ended_ = true;
  if (status_.ok()) status_ = status;
}

void AttendStream::Proceed() {
  if (!has_ended_ && !is_reading_ && call_count_ + answers_.size() < kStreamCallsMax) {
    is_reading_ = true;
    stream_.Read(&message_, read_.tag());
  }
  if (is_writing_) return;
  if (!answers_.empty()) {
    is_writing_ = true;
    stream_.Write(answers_.front(), written_.tag());
    return;
  }
  if (!has_ended_ || is_reading_ || call_count_ > 0 || is_finishing_) return;
  is_finishing_ = true;
  stream_.Finish(ToGrpcStatus(status_, &context_), finished_.tag());
}

void AttendStream::Written(bool ok) {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_writing_ = false;
  answers_.pop_front();
  if (!ok) {
    is_broken_ = true;
    answers_.clear();
    // The read under way fails too.
    EndReading(absl::OkStatus());
  }
  Proceed();
}

void AttendStream::Finished(bool /*ok*/) {
  // Whoever asked for it still holds the lock.
  { const std::lock_guard<std::mutex> lock(mutex_); }
  delete this;
}

}  // namespace kvservice
