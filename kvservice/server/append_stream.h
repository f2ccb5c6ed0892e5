// The life of an Append stream: one message is read, applied by the engine, and only then the next
// is read, so HTTP/2 flow control holds a client back to the pace of the engine. A stream that
// breaks keeps what was applied and leaves nothing else behind.
//
//     listening -> (arrives) -> reading <-> applying
//                                  |  end of stream, or an error
//                               closing -> replying -> deleted

#ifndef KVSERVICE_KVSERVICE_SERVER_APPEND_STREAM_H_
#define KVSERVICE_KVSERVICE_SERVER_APPEND_STREAM_H_

#include <grpcpp/completion_queue.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "kvservice/engine.h"
#include "kvservice/server/call.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice {

// What the sequence service says about its Append method; borrowed, outlives all streams.
struct AppendMethod {
  using Reader = grpc::ServerAsyncReader<grpc::ByteBuffer, grpc::ByteBuffer>;
  CallHost host;
  MethodAccess access;
  Engine* engine = nullptr;
  // Asks gRPC for a stream.
  std::function<void(grpc::ServerContext* context, Reader* reader,
                     grpc::ServerCompletionQueue* queue, void* tag)>
      request;
};

class AppendStream final : public CompletionTag {
 public:
  static void Listen(const AppendMethod* method, grpc::ServerCompletionQueue* queue);

  void Complete(bool ok) override;

 private:
  AppendStream(const AppendMethod* method, grpc::ServerCompletionQueue* queue)
      : method_(method), queue_(queue) {}
  ~AppendStream();

  void Arrive();
  void Read();
  void Apply();
  // The next message as a call; its tensors borrow from message_.
  absl::StatusOr<AppendCall> NextCall();
  void Applied(absl::StatusOr<AppendResult> result);
  void Close();
  void Reply(const absl::StatusOr<SequenceInfo>& info);
  void Fail(const absl::Status& status);
  void Ended(const absl::Status& status);

  const AppendMethod* const method_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::ServerContext context_;
  AppendMethod::Reader reader_{&context_};

  // One event or engine call is under way at any time; it alone touches what follows.
  enum class State { kListening, kReading, kApplying, kReplying };
  State state_ = State::kListening;
  Caller caller_;
  uint64_t arrived_ns_ = 0;
  grpc::ByteBuffer buffer_;
  v1::AppendRequest message_;
  size_t reserved_bytes_ = 0;
  SequenceId sequence_;
  v1::AppendResponse response_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_APPEND_STREAM_H_
