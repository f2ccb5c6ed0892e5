#include "tests/bench/grpc_echo.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace kvservice::bench {
namespace {

constexpr char kUnaryMethod[] = "/echo/Unary";
constexpr char kStreamMethod[] = "/echo/Stream";
// The same with answers by another thread than the queue's.
constexpr char kUnaryByThreadMethod[] = "/echo/UnaryByThread";
constexpr char kStreamByThreadMethod[] = "/echo/StreamByThread";
constexpr char kFlag[] = "--grpc-echo";

// Runs what it is given, in turn, on a thread of its own. Never deleted: the process is killed.
class Replier {
 public:
  Replier() : thread_([this] { Run(); }) {}

  void Push(std::function<void()> reply) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      replies_.push_back(std::move(reply));
    }
    changed_.notify_one();
  }

 private:
  void Run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return !replies_.empty(); });
      const std::function<void()> reply = std::move(replies_.front());
      replies_.pop_front();
      lock.unlock();
      reply();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_; each client has one call at a time.
  std::deque<std::function<void()>> replies_;
  std::thread thread_;
};

struct EchoServer {
  grpc::AsyncGenericService service;
  std::unique_ptr<grpc::ServerCompletionQueue> queue;
  Replier replier;
};

// A call of the server: reads, and writes what it has read, until its client has said everything.
class EchoCall {
 public:
  static void Listen(EchoServer* server) {
    auto* const call = new EchoCall(server);
    grpc::ServerCompletionQueue* const queue = server->queue.get();
    server->service.RequestCall(&call->context_, &call->stream_, queue, queue, call);
  }

  void Complete(bool ok) {
    switch (next_) {
      case Next::kArrive:
        if (!ok) return Delete();
        Listen(server_);
        return Read();
      case Next::kRead:
        if (!ok) return Finish();
        if (context_.method() == kStreamByThreadMethod ||
            context_.method() == kUnaryByThreadMethod) {
          return server_->replier.Push([this] { Reply(); });
        }
        return Reply();
      case Next::kWrite:
        return ok ? Read() : Finish();
      case Next::kFinish:
        return Delete();
    }
  }

 private:
  enum class Next { kArrive, kRead, kWrite, kFinish };

  explicit EchoCall(EchoServer* server) : server_(server) {}

  void Reply() {
    const bool is_stream =
        context_.method() == kStreamMethod || context_.method() == kStreamByThreadMethod;
    next_ = is_stream ? Next::kWrite : Next::kFinish;
    if (is_stream) return stream_.Write(bytes_, this);
    stream_.WriteAndFinish(bytes_, {}, grpc::Status::OK, this);
  }

  void Read() {
    next_ = Next::kRead;
    stream_.Read(&bytes_, this);
  }
  void Finish() {
    next_ = Next::kFinish;
    stream_.Finish(grpc::Status::OK, this);
  }
  void Delete() { delete this; }

  EchoServer* const server_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  grpc::ByteBuffer bytes_;
  Next next_ = Next::kArrive;
};

class ProcessEcho final : public GrpcEcho {
 public:
  ProcessEcho(pid_t pid, std::string folder, size_t bytes)
      : pid_(pid), folder_(std::move(folder)), bytes_(bytes) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 20);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
    channel_ = grpc::CreateCustomChannel("unix:" + folder_ + "/echo",
                                         grpc::InsecureChannelCredentials(), arguments);
    stub_ = std::make_unique<grpc::GenericStub>(channel_);
  }
  ~ProcessEcho() override {
    for (Stream& stream : streams_) stream.context.TryCancel();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
    if (pid_ > 0) kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    std::error_code error;
    std::filesystem::remove_all(folder_, error);
  }

  bool WaitUntilConnected() {
    constexpr auto kTimeMax = std::chrono::seconds(30);
    return channel_->WaitForConnected(std::chrono::system_clock::now() + kTimeMax);
  }

  bool CallUnary(bool by_thread) override {
    grpc::ClientContext context;
    grpc::ByteBuffer reply;
    grpc::Status status;
    const auto call = stub_->PrepareUnaryCall(
        &context, by_thread ? kUnaryByThreadMethod : kUnaryMethod, Message(), &queue_);
    call->StartCall();
    call->Finish(&reply, &status, this);
    return Await(1) && status.ok() && reply.Length() == bytes_;
  }

  bool CallStream(bool by_thread) override {
    Stream& stream = streams_[by_thread ? 1 : 0];
    if (stream.rpc == nullptr) {
      stream.rpc = stub_->PrepareCall(&stream.context,
                                      by_thread ? kStreamByThreadMethod : kStreamMethod, &queue_);
      stream.rpc->StartCall(this);
      if (!Await(1)) return false;
    }
    grpc::ByteBuffer reply;
    stream.rpc->Write(Message(), this);
    stream.rpc->Read(&reply, this);
    return Await(2) && reply.Length() == bytes_;
  }

 private:
  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::GenericClientAsyncReaderWriter> rpc;
  };

  grpc::ByteBuffer Message() const {
    const grpc::Slice slice(bytes_);
    return {&slice, 1};
  }
  bool Await(int operation_count) {
    bool all_ok = true;
    for (; operation_count > 0; --operation_count) {
      void* tag = nullptr;
      bool ok = false;
      all_ok = queue_.Next(&tag, &ok) && ok && all_ok;
    }
    return all_ok;
  }

  const pid_t pid_;
  const std::string folder_;
  const size_t bytes_;
  std::shared_ptr<grpc::Channel> channel_;  // gRPC's API shares channels.
  std::unique_ptr<grpc::GenericStub> stub_;
  grpc::CompletionQueue queue_;
  std::array<Stream, 2> streams_;
};

}  // namespace

int ServeGrpcEcho(const std::string& path) {
  auto* const echo = new EchoServer;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(-1);
  builder.AddListeningPort("unix:" + path, grpc::InsecureServerCredentials());
  builder.RegisterAsyncGenericService(&echo->service);
  echo->queue = builder.AddCompletionQueue();
  const auto server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  EchoCall::Listen(echo);
  void* tag = nullptr;
  bool ok = false;
  while (echo->queue->Next(&tag, &ok)) static_cast<EchoCall*>(tag)->Complete(ok);
  return 0;
}

absl::StatusOr<std::unique_ptr<GrpcEcho>> GrpcEcho::Start(size_t bytes) {
  std::string folder = (std::filesystem::temp_directory_path() / "kvbench-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) return absl::UnavailableError("no temporary folder");
  std::vector<std::string> arguments = {"kvbench", std::string(kFlag) + "=" + folder + "/echo"};
  std::vector<char*> argv = {arguments[0].data(), arguments[1].data(), nullptr};
  pid_t pid = 0;
  if (posix_spawn(&pid, "/proc/self/exe", nullptr, nullptr, argv.data(), environ) != 0) {
    std::filesystem::remove_all(folder);
    return absl::UnavailableError("cannot start another kvbench");
  }
  auto echo = std::make_unique<ProcessEcho>(pid, std::move(folder), bytes);
  if (!echo->WaitUntilConnected()) return absl::UnavailableError("the echo does not answer");
  return echo;
}

}  // namespace kvservice::bench
