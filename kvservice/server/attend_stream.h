// The life of an AttendStream: the messages of Attend on one long-lived stream. Up to
// kStreamCallsMax calls are with the engine at a time; while so many are, nothing more is read, and
// HTTP/2 flow control holds the client back. Answers come as calls end, paired by step_id. A call's
// error is in its answer and the stream goes on; a message that cannot be parsed ends it, and so
// does the end of the client's side once everything has been answered.
//
//     listening -> (arrives) -> open: reading | calls with the engine | writing
//                                  |  the client is done or gone, and all of that has ended
//                               finishing -> deleted

#ifndef KVSERVICE_KVSERVICE_SERVER_ATTEND_STREAM_H_
#define KVSERVICE_KVSERVICE_SERVER_ATTEND_STREAM_H_

#include <grpcpp/completion_queue.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "kvservice/server/call.h"
#include "kvservice/server/service.h"

namespace kvservice {

// What the attention service says about its AttendStream method; borrowed, outlives all streams.
struct AttendStreamMethod {
  using Stream = grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;
  ServiceHost host;
  MethodAccess access;
  // Asks gRPC for a stream.
  std::function<void(grpc::ServerContext* context, Stream* stream,
                     grpc::ServerCompletionQueue* queue, void* tag)>
      request;
};

// Owns itself from Listen until its last event. Events come on the queue's thread, answers on the
// engine's.
class AttendStream {
 public:
  static void Listen(const AttendStreamMethod* method, grpc::ServerCompletionQueue* queue);
  AttendStream(const AttendStream&) = delete;
  AttendStream& operator=(const AttendStream&) = delete;

 private:
  struct Call;
  // Tells the stream which of its operations has ended.
  class Event final : public CompletionTag {
   public:
    Event(AttendStream* stream, void (AttendStream::*handle)(bool ok))
        : stream_(stream), handle_(handle) {}
    void Complete(bool ok) override { (stream_->*handle_)(ok); }
    void* tag() { return static_cast<CompletionTag*>(this); }

   private:
    AttendStream* const stream_;
    void (AttendStream::*const handle_)(bool ok);
  };

  AttendStream(const AttendStreamMethod* method, grpc::ServerCompletionQueue* queue)
      : method_(method), queue_(queue) {}
  ~AttendStream();

  void Arrived(bool ok);
  void Read(bool ok);
  void Written(bool ok);
  void Finished(bool ok);

  absl::Status Begin(Call* call);
  void Answer(std::unique_ptr<Call> call, const absl::Status& status);
  // These need mutex_ held. Starts what can be started, also the end: the stream may be gone once
  // the lock is.
  void Proceed();
  void EndReading(const absl::Status& status);

  const AttendStreamMethod* const method_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::ServerContext context_;
  AttendStreamMethod::Stream stream_{&context_};
  Event arrived_{this, &AttendStream::Arrived};
  Event read_{this, &AttendStream::Read};
  Event written_{this, &AttendStream::Written};
  Event finished_{this, &AttendStream::Finished};
  bool is_open_ = false;
  uint64_t arrived_ns_ = 0;
  // Of the read under way.
  grpc::ByteBuffer message_;

  std::mutex mutex_;
  // Guarded by mutex_.
  bool is_reading_ = false;
  bool is_writing_ = false;
  bool is_finishing_ = false;
  // Nothing more is read; and nothing more can be written.
  bool has_ended_ = false;
  bool is_broken_ = false;
  absl::Status status_;
  uint32_t call_count_ = 0;
  std::deque<grpc::ByteBuffer> answers_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ATTEND_STREAM_H_
