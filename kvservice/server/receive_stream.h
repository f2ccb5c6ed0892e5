// The target's end of a transfer between servers: one message is read, taken by the engine, and
// answered if it is one that is, before the next is read, so HTTP/2 flow control holds a source
// back to the pace of the engine. What was taken when a stream breaks waits in the engine for the
// next stream.
//
//     listening -> (arrives) -> reading <-> taking -> writing -> reading
//                                  |  end of stream, or an error
//                               finishing -> deleted

#ifndef KVSERVICE_KVSERVICE_SERVER_RECEIVE_STREAM_H_
#define KVSERVICE_KVSERVICE_SERVER_RECEIVE_STREAM_H_

#include <grpcpp/completion_queue.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "kvservice/server/call.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice {

// What the sequence service says about its Receive method; borrowed, outlives all streams.
struct ReceiveMethod {
  using Stream = grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;
  MethodAccess access;
  CallHost host;
  Engine* engine = nullptr;
  // Asks gRPC for a stream.
  std::function<void(grpc::ServerContext* context, Stream* stream,
                     grpc::ServerCompletionQueue* queue, void* tag)>
      request;
};

class ReceiveStream final : public CompletionTag {
 public:
  static void Listen(const ReceiveMethod* method, grpc::ServerCompletionQueue* queue);

  void Complete(bool ok) override;

 private:
  ReceiveStream(const ReceiveMethod* method, grpc::ServerCompletionQueue* queue)
      : method_(method), queue_(queue) {}
  ~ReceiveStream();

  void Arrive();
  void Read();
  void Take();
  absl::StatusOr<TransferPart> NextPart();
  void Taken(absl::StatusOr<ReceiveReply> reply, bool is_answered);
  void Finish(const absl::Status& status);

  const ReceiveMethod* const method_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::ServerContext context_;
  ReceiveMethod::Stream stream_{&context_};

  // One event or engine call is under way at any time; it alone touches what follows.
  enum class State { kListening, kReading, kTaking, kWriting, kFinishing };
  State state_ = State::kListening;
  Caller caller_;
  uint64_t arrived_ns_ = 0;
  grpc::ByteBuffer buffer_;
  size_t reserved_bytes_ = 0;
  bool has_begun_ = false;
  TransferAttempt attempt_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_RECEIVE_STREAM_H_
