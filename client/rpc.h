// The calls of the data side as messages: deadlines, retries and statuses, without knowing what the
// messages mean. Inside the library only; the one file that includes gRPC is rpc.cc.

#ifndef KVSERVICE_CLIENT_RPC_H_
#define KVSERVICE_CLIENT_RPC_H_

#include <chrono>
#include <memory>

#include "absl/status/status.h"
#include "client/append_part.h"
#include "client/options.h"
#include "client/payload_message.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::client {

// One Append stream. One thread. Deleting an unfinished one cancels it.
class AppendStream {
 public:
  virtual ~AppendStream() = default;
  virtual AppendLimits limits() const = 0;
  virtual Transport transport() const = 0;
  // Blocks while the server is behind. False: the stream has ended and Finish tells why.
  virtual bool Write(const AppendPart& part) = 0;
  // Blocks until the server has applied everything. Once.
  virtual absl::Status Finish(v1::AppendResponse* response) = 0;
};

// One stream of Attend calls, one at a time. One thread. Deleting it cancels it.
class AttendStream {
 public:
  virtual ~AttendStream() = default;
  // As Rpc::Attend, but nothing is repeated.
  virtual absl::Status Attend(const PayloadMessage& request,
                              std::chrono::steady_clock::time_point deadline,
                              v1::AttendResponse* response) = 0;
  // False once a call has failed other than by an answer: the stream is of no more use.
  virtual bool is_open() const = 0;
};

// Any thread. Responses are valid only when the status is OK.
class Rpc {
 public:
  virtual ~Rpc() = default;

  // True when a connection stands before `deadline` has passed.
  virtual bool WaitUntilConnected(std::chrono::milliseconds deadline) = 0;

  virtual absl::Status Register(const v1::RegisterRequest& request,
                                v1::RegisterResponse* response) = 0;
  // Repeated when needed: `request` must carry a request id.
  virtual absl::Status Create(const v1::CreateRequest& request, v1::CreateResponse* response) = 0;
  virtual absl::Status Fork(const v1::ForkRequest& request, v1::ForkResponse* response) = 0;
  virtual absl::Status Truncate(const v1::TruncateRequest& request,
                                v1::TruncateResponse* response) = 0;
  virtual absl::Status Get(const v1::GetRequest& request, v1::GetResponse* response) = 0;
  virtual absl::Status Suspend(const v1::SuspendRequest& request,
                               v1::SuspendResponse* response) = 0;
  virtual absl::Status Resume(const v1::ResumeRequest& request, v1::ResumeResponse* response) = 0;
  // Between two servers: as long as they need, within the admin deadline.
  virtual absl::Status Transfer(const v1::TransferRequest& request,
                                v1::TransferResponse* response) = 0;
  // `request` is an AttendRequest.
  virtual absl::Status Attend(const PayloadMessage& request,
                              std::chrono::steady_clock::time_point deadline,
                              v1::AttendResponse* response) = 0;
  // NOT_FOUND after a lost first attempt is OK: that attempt did it.
  virtual absl::Status Drop(const v1::DropRequest& request) = 0;
  // One attempt that ends at `deadline`.
  virtual absl::Status DropOnce(const v1::DropRequest& request,
                                std::chrono::steady_clock::time_point deadline) = 0;

  virtual std::unique_ptr<AppendStream> OpenAppend() = 0;
  virtual std::unique_ptr<AttendStream> OpenAttend() = 0;
};

std::unique_ptr<Rpc> NewRpc(const ClientOptions& options);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_RPC_H_
