#include "client/rpc.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <optional>
#include <thread>
#include <utility>

#include "client/channel_credentials.h"
#include "client/error.h"
#include "client/payload_message.h"
#include "client/retry.h"
#include "kvservice/v1/model.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"

namespace kvservice::client {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A restarted server is found again this soon, and this late.
constexpr int kReconnectMs = 20;
constexpr int kReconnectMsMax = 1'000;

absl::Status ToStatus(const grpc::Status& status) {
  return StatusFromWire(status.error_code(), status.error_message(), status.error_details());
}

std::chrono::system_clock::time_point After(milliseconds duration) {
  return std::chrono::system_clock::now() + duration;
}

milliseconds Until(steady_clock::time_point end) {
  const auto left = std::chrono::duration_cast<milliseconds>(end - steady_clock::now());
  return std::max(left, milliseconds(0));
}

std::shared_ptr<grpc::Channel> NewChannel(const ClientOptions& options) {
  grpc::ChannelArguments arguments;
  const int bytes_max = static_cast<int>(std::min<size_t>(options.message_bytes_max, INT_MAX));
  arguments.SetMaxReceiveMessageSize(bytes_max);
  arguments.SetMaxSendMessageSize(bytes_max);
  // Retries are ours: gRPC's own leave out every request above its buffer.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Clients of one process would otherwise share a connection and its reconnection pauses.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMsMax);
  SetServerName(options.tls, &arguments);
  return grpc::CreateCustomChannel(options.endpoint, ChannelCredentialsOf(options.tls), arguments);
}

constexpr char kAppendMethod[] = "/kvservice.v1.SequenceService/Append";
constexpr char kAttendMethod[] = "/kvservice.v1.AttentionService/Attend";
constexpr char kAttendStreamMethod[] = "/kvservice.v1.AttentionService/AttendStream";
// The size at which streams are fastest.
constexpr size_t kAppendBytesAim = size_t{1} << 20;

grpc::ByteBuffer Bytes(const PayloadMessage& message) {
  grpc::Slice slice(message.bytes());
  message.Write(const_cast<uint8_t*>(slice.begin()));
  return {&slice, 1};
}

// Empties the bytes.
template <typename Message>
bool Parse(grpc::ByteBuffer* bytes, Message* message) {
  return grpc::SerializationTraits<Message>::Deserialize(bytes, message).ok();
}

class GrpcAppendStream final : public AppendStream {
 public:
  GrpcAppendStream(const std::shared_ptr<grpc::Channel>& channel, milliseconds deadline)
      : stub_(channel) {
    context_.set_deadline(After(deadline));
    stream_ = stub_.PrepareCall(&context_, kAppendMethod, &queue_);
    stream_->StartCall(this);
    is_open_ = Await();
  }
  ~GrpcAppendStream() override {
    if (!finished_) {
      context_.TryCancel();
      grpc::Status status;
      stream_->Finish(&status, this);
      Await();
    }
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  Transport transport() const override { return Transport::kStream; }
  AppendLimits limits() const override {
    return {.token_bytes_aim = kAppendBytesAim, .bytes_max = SIZE_MAX};
  }

  bool Write(const AppendPart& part) override {
    if (!is_open_) return false;
    PayloadMessage message(&part.request);
    if (!part.query_sample.empty()) {
      message.Add(v1::AppendRequest::kQuerySampleFieldNumber, part.query_sample);
    }
    message.Add(v1::AppendRequest::kKFieldNumber, part.k);
    message.Add(v1::AppendRequest::kVFieldNumber, part.v);
    stream_->Write(Bytes(message), this);
    is_open_ = Await();
    return is_open_;
  }

  absl::Status Finish(v1::AppendResponse* response) override {
    finished_ = true;
    grpc::ByteBuffer bytes;
    if (is_open_) {
      stream_->WritesDone(this);
      Await();
      stream_->Read(&bytes, this);
      is_open_ = Await();
    }
    grpc::Status status;
    stream_->Finish(&status, this);
    Await();
    if (!status.ok()) return ToStatus(status);
    return is_open_ && Parse(&bytes, response) ? absl::OkStatus()
                                               : MalformedReply("message", "is no AppendResponse");
  }

 private:
  // The end of the operation under way; whether it worked. The call's deadline bounds it.
  bool Await() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  bool is_open_ = false;
  bool finished_ = false;
};

class GrpcAttendStream final : public AttendStream {
 public:
  explicit GrpcAttendStream(const std::shared_ptr<grpc::Channel>& channel) : stub_(channel) {}
  ~GrpcAttendStream() override {
    context_.TryCancel();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  bool is_open() const override { return is_open_; }

  absl::Status Attend(const PayloadMessage& request, steady_clock::time_point deadline,
                      v1::AttendResponse* response) override {
    const auto end = After(Until(deadline));
    is_open_ = false;
    if (stream_ == nullptr) {
      stream_ = stub_.PrepareCall(&context_, kAttendStreamMethod, &queue_);
      stream_->StartCall(this);
      const absl::Status started = Await(1, end);
      if (!started.ok()) return started;
    }
    stream_->Write(Bytes(request), this);
    stream_->Read(&reply_, this);
    const absl::Status answered = Await(2, end);
    if (!answered.ok()) return answered;
    if (!Parse(&reply_, response)) return MalformedReply("message", "is no AttendResponse");
    is_open_ = true;
    if (!response->has_error()) return absl::OkStatus();
    const v1::Status& error = response->error();
    return StatusFromWire(error.code(), error.message(), error.SerializeAsString());
  }

 private:
  // The ends of that many operations. When one has failed, the stream's status.
  absl::Status Await(int operation_count, std::chrono::system_clock::time_point end) {
    bool all_ok = true;
    while (operation_count > 0) {
      void* tag = nullptr;
      bool ok = false;
      if (queue_.AsyncNext(&tag, &ok, end) != grpc::CompletionQueue::GOT_EVENT) {
        return absl::DeadlineExceededError("the server did not answer in time");
      }
      all_ok = all_ok && ok;
      --operation_count;
    }
    if (all_ok) return absl::OkStatus();
    stream_->Finish(&finish_status_, this);
    void* tag = nullptr;
    bool ok = false;
    if (queue_.AsyncNext(&tag, &ok, end) != grpc::CompletionQueue::GOT_EVENT) {
      return absl::DeadlineExceededError("the server did not answer in time");
    }
    const absl::Status status = ToStatus(finish_status_);
    return status.ok() ? absl::UnavailableError("the server ended the stream") : status;
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  // Written by operations that may end after the call that began them.
  grpc::ByteBuffer reply_;
  grpc::Status finish_status_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  bool is_open_ = true;
};

class GrpcRpc final : public Rpc {
 public:
  explicit GrpcRpc(const ClientOptions& options)
      : deadlines_(options.deadlines),
        retry_(options.retry),
        channel_(NewChannel(options)),
        models_(v1::ModelService::NewStub(channel_)),
        sequences_(v1::SequenceService::NewStub(channel_)),
        generic_(channel_) {}

  bool WaitUntilConnected(milliseconds deadline) override {
    return channel_->WaitForConnected(After(deadline));
  }

  absl::Status Register(const v1::RegisterRequest& request,
                        v1::RegisterResponse* response) override {
    return Call(models_.get(), &v1::ModelService::Stub::Register, request, response,
                deadlines_.admin, Repeat::kAlways);
  }
  absl::Status Create(const v1::CreateRequest& request, v1::CreateResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Create, request, response,
                deadlines_.data, Repeat::kAlways);
  }
  absl::Status Fork(const v1::ForkRequest& request, v1::ForkResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Fork, request, response,
                deadlines_.data, Repeat::kIfRefused);
  }
  absl::Status Truncate(const v1::TruncateRequest& request,
                        v1::TruncateResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Truncate, request, response,
                deadlines_.data, Repeat::kIfRefused);
  }
  absl::Status Get(const v1::GetRequest& request, v1::GetResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Get, request, response,
                deadlines_.data, Repeat::kAlways);
  }
  // A disk may take longer than memory.
  absl::Status Suspend(const v1::SuspendRequest& request, v1::SuspendResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Suspend, request, response,
                deadlines_.admin, Repeat::kAlways);
  }
  absl::Status Resume(const v1::ResumeRequest& request, v1::ResumeResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Resume, request, response,
                deadlines_.admin, Repeat::kIfRefused);
  }
  // A repeat goes on where the attempt before stopped.
  absl::Status Transfer(const v1::TransferRequest& request,
                        v1::TransferResponse* response) override {
    return Call(sequences_.get(), &v1::SequenceService::Stub::Transfer, request, response,
                deadlines_.admin, Repeat::kAlways);
  }
  absl::Status Attend(const PayloadMessage& request, steady_clock::time_point deadline,
                      v1::AttendResponse* response) override {
    return Repeated(Until(deadline), Repeat::kAlways,
                    [&](milliseconds left) { return AttemptAttend(request, left, response); });
  }
  absl::Status Drop(const v1::DropRequest& request) override {
    v1::DropResponse response;
    uint32_t attempts = 0;
    const absl::Status status = Call(sequences_.get(), &v1::SequenceService::Stub::Drop, request,
                                     &response, deadlines_.data, Repeat::kAlways, &attempts);
    return attempts > 1 && absl::IsNotFound(status) ? absl::OkStatus() : status;
  }
  absl::Status DropOnce(const v1::DropRequest& request,
                        steady_clock::time_point deadline) override {
    v1::DropResponse response;
    return Attempt(sequences_.get(), &v1::SequenceService::Stub::Drop, request, &response,
                   Until(deadline));
  }

  std::unique_ptr<AppendStream> OpenAppend() override {
    return std::make_unique<GrpcAppendStream>(channel_, deadlines_.admin);
  }
  std::unique_ptr<AttendStream> OpenAttend() override {
    return std::make_unique<GrpcAttendStream>(channel_);
  }

 private:
  template <typename Stub, typename Request, typename Response>
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Response*);

  template <typename Stub, typename Request, typename Response>
  static absl::Status Attempt(Stub* stub, Method<Stub, Request, Response> method,
                              const Request& request, Response* response, milliseconds deadline) {
    grpc::ClientContext context;
    context.set_deadline(After(deadline));
    response->Clear();
    return ToStatus((stub->*method)(&context, request, response));
  }

  absl::Status AttemptAttend(const PayloadMessage& request, milliseconds deadline,
                             v1::AttendResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(After(deadline));
    grpc::CompletionQueue queue;
    grpc::ByteBuffer reply;
    grpc::Status status;
    const auto call = generic_.PrepareUnaryCall(&context, kAttendMethod, Bytes(request), &queue);
    call->StartCall();
    call->Finish(&reply, &status, this);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    if (!status.ok()) return ToStatus(status);
    return Parse(&reply, response) ? absl::OkStatus()
                                   : MalformedReply("message", "is no AttendResponse");
  }

  // `attempts`, if given, is set to the number of attempts made.
  template <typename Stub, typename Request, typename Response>
  absl::Status Call(Stub* stub, Method<Stub, Request, Response> method, const Request& request,
                    Response* response, milliseconds deadline, Repeat repeat,
                    uint32_t* attempts = nullptr) {
    return Repeated(deadline, repeat, [&](milliseconds left) {
      if (attempts != nullptr) ++*attempts;
      return Attempt(stub, method, request, response, left);
    });
  }

  // `attempt` takes the time that is left.
  template <typename OneAttempt>
  absl::Status Repeated(milliseconds deadline, Repeat repeat, const OneAttempt& attempt) {
    const steady_clock::time_point end = steady_clock::now() + deadline;
    Backoff backoff(retry_, repeat, seeds_.fetch_add(1, std::memory_order_relaxed));
    for (;;) {
      absl::Status status = attempt(Until(end));
      if (status.ok()) return status;
      const std::optional<milliseconds> pause = backoff.Next(status, Until(end));
      if (!pause.has_value()) return status;
      std::this_thread::sleep_for(*pause);
    }
  }

  const Deadlines deadlines_;
  const RetryOptions retry_;
  const std::shared_ptr<grpc::Channel> channel_;  // gRPC's API shares channels.
  const std::unique_ptr<v1::ModelService::Stub> models_;
  const std::unique_ptr<v1::SequenceService::Stub> sequences_;
  grpc::GenericStub generic_;
  // Different clients and calls must not pause alike.
  std::atomic<uint64_t> seeds_{
      static_cast<uint64_t>(steady_clock::now().time_since_epoch().count())};
};

}  // namespace

std::unique_ptr<Rpc> NewRpc(const ClientOptions& options) {
  return std::make_unique<GrpcRpc>(options);
}

}  // namespace kvservice::client
