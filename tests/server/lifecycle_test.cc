// A server as a whole: health, reflection, methods that are not served, drains, limits on
// connections.

#include <google/protobuf/descriptor.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/server/health.h"
#include "kvservice/v1/admin.grpc.pb.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/cut_proxy.h"
#include "tests/server/raw_call.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

// grpc.health.v1 and reflection, without their stubs: HealthCheckRequest{1: service},
// HealthCheckResponse{1: status}.
constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";
constexpr char kReflection[] = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
constexpr char kServing[] = "\x08\x01";
constexpr char kNotServing[] = "\x08\x02";

std::string StringField(int number, const std::string& value) {
  return std::string(1, static_cast<char>(number << 3 | 2)) + static_cast<char>(value.size()) +
         value;
}

// The reply's bytes, or the error as text.
std::string Health(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  std::string reply;
  const grpc::Status status =
      CallRaw(channel, kHealthCheck, BytesOf(StringField(1, service)), &reply);
  return status.ok() ? reply : ErrorText(status);
}

std::set<std::string> MethodsNotServed() {
  return {"AttentionService/Select", "AdminService/WatchEvents"};
}

v1::SequenceHandle NewSequence(v1::SequenceService::Stub* sequences) {
  v1::CreateRequest request;
  request.set_model(kModel);
  v1::CreateResponse response;
  EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), request, &response)), "OK");
  return response.sequence().handle();
}

TEST(LifecycleTest, HealthIsServedOnBothSides) {
  ServedEngine served;
  for (const auto& channel : {served.Connect(), served.ConnectAsOther(), served.ConnectAdmin()}) {
    EXPECT_EQ(Health(channel, ""), kServing);
    EXPECT_EQ(Health(channel, "kvservice.v1.AttentionService"), kServing);
    EXPECT_EQ(Health(channel, "kvservice.liveness"), kServing);
    EXPECT_EQ(Health(channel, "kvservice.v1.Unknown"), "NOT_FOUND SERVICE_UNKNOWN service");
  }
}

// A stream of grpc.health.v1.Health/Watch.
class HealthWatch {
 public:
  HealthWatch(const std::shared_ptr<grpc::Channel>& channel, const std::string& service)
      : stub_(channel) {
    stream_ = stub_.PrepareCall(&context_, "/grpc.health.v1.Health/Watch", &queue_);
    stream_->StartCall(this);
    EXPECT_TRUE(Await());
    stream_->WriteLast(BytesOf(StringField(1, service)), {}, this);
    EXPECT_TRUE(Await());
  }
  ~HealthWatch() {
    Cancel();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }
  void Cancel() { context_.TryCancel(); }
  // The next message; "" at the end.
  std::string Next() {
    grpc::ByteBuffer bytes;
    stream_->Read(&bytes, this);
    return Await() ? TextOf(bytes) : "";
  }

 private:
  bool Await() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
};

TEST(LifecycleTest, WatchersHearOfChangesAndHoldUpNothing) {
  ServedEngine served;
  HealthWatch alive(served.ConnectAdmin(), "kvservice.liveness");
  HealthWatch unknown(served.Connect(), "nobody");
  HealthWatch ready(served.ConnectAdmin(), "");
  EXPECT_EQ(alive.Next(), kServing);
  EXPECT_EQ(ready.Next(), kServing);
  EXPECT_EQ(unknown.Next(), "\x08\x03");
  for (int i = 0; i < 100; ++i) {
    HealthWatch gone(served.Connect(), "");
    if (i % 2 == 0) {
      EXPECT_EQ(gone.Next(), kServing);
    }
    gone.Cancel();
  }
  served.server()->Drain(60'000);
  EXPECT_EQ(ready.Next(), kNotServing);
  EXPECT_EQ(unknown.Next(), "") << "the data side is gone";
}

// The first status comes by the same way as the later ones: a change cannot come between.
TEST(LifecycleTest, WatchersOfABoardHearHowItIs) {
  HealthBoard board;
  board.Set("a", true);
  std::vector<HealthStatus> heard;
  const uint64_t number = board.Watch("a", [&](HealthStatus status) { heard.push_back(status); });
  EXPECT_EQ(heard, (std::vector{HealthStatus::kServing}));
  board.Set("b", true);
  board.Set("a", false);
  EXPECT_EQ(heard, (std::vector{HealthStatus::kServing, HealthStatus::kNotServing}));
  board.Unwatch(number);
  board.Set("a", true);
  EXPECT_EQ(heard.size(), 2U);
}

TEST(LifecycleTest, ReflectionListsTheServices) {
  ServedEngine served;
  // ServerReflectionRequest{7: list_services}.
  const auto list = [](const std::shared_ptr<grpc::Channel>& channel) {
    std::string reply;
    EXPECT_TRUE(CallRaw(channel, kReflection, BytesOf(StringField(7, "")), &reply).ok());
    return reply;
  };
  const std::string data = list(served.Connect());
  for (const char* service : {"AttentionService", "SequenceService", "ModelService"}) {
    EXPECT_NE(data.find(service), std::string::npos) << service;
  }
  EXPECT_EQ(data.find("AdminService"), std::string::npos);
  EXPECT_NE(list(served.ConnectAdmin()).find("AdminService"), std::string::npos);
}

// Generated from the API itself, so that a method cannot be forgotten.
TEST(LifecycleTest, EveryMethodIsServedOrSaysThatItIsNot) {
  ServedEngine served;
  const std::set<std::string> not_served = MethodsNotServed();
  size_t method_count = 0;
  for (const char* file : {"admin", "attention", "model", "sequence"}) {
    const google::protobuf::ServiceDescriptor* const service =
        google::protobuf::DescriptorPool::generated_pool()
            ->FindFileByName("kvservice/v1/" + std::string(file) + ".proto")
            ->service(0);
    const bool admin = std::string(file) == "admin";
    const auto channel = admin ? served.ConnectAdmin() : served.Connect();
    for (int i = 0; i < service->method_count(); ++i, ++method_count) {
      const std::string name = service->name() + "/" + service->method(i)->name();
      const RpcError error =
          ErrorOf(CallRaw(channel, "/kvservice.v1." + name, BytesOf(std::string())));
      if (not_served.count(name) == 0) {
        EXPECT_NE(error.code, grpc::StatusCode::UNIMPLEMENTED) << name;
        continue;
      }
      EXPECT_EQ(error.code, grpc::StatusCode::UNIMPLEMENTED) << name;
      EXPECT_EQ(error.reason, "METHOD_NOT_SERVED") << name;
      EXPECT_EQ(error.metadata.at("method"), "/kvservice.v1." + name);
    }
  }
  EXPECT_GT(method_count, not_served.size());
}

TEST(LifecycleTest, UnknownMethodsAndForeignServicesAreToldApart) {
  ServedEngine served;
  const auto channel = served.Connect();
  for (const char* method : {"/kvservice.v1.AttentionService/Guess", "/no.such.Service/Method"}) {
    EXPECT_EQ(ErrorText(CallRaw(channel, method, BytesOf(std::string("x")))),
              "UNIMPLEMENTED METHOD_UNKNOWN");
  }
  // The admin side has a listener of its own.
  EXPECT_EQ(
      ErrorText(CallRaw(channel, "/kvservice.v1.AdminService/GetStats", BytesOf(std::string()))),
      "UNIMPLEMENTED METHOD_NOT_SERVED");
}

class DrainTest : public ::testing::Test {
 protected:
  DrainTest() {
    auto device = std::make_unique<WatchedDevice>(*NewDevice("reference", {}));
    device->set_before([this](const LayerShape& /*shape*/, absl::Span<AttendRow> /*rows*/) {
      attending_.set_value();
      go_.get_future().wait();
    });
    ServedEngineOptions options;
    options.device = std::move(device);
    served_ = std::make_unique<ServedEngine>(std::move(options));
    channel_ = served_->Connect();
    sequences_ = v1::SequenceService::NewStub(channel_);
    handle_ = NewSequence(sequences_.get());
  }

  std::promise<void> attending_;
  std::promise<void> go_;
  std::unique_ptr<ServedEngine> served_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
  v1::SequenceHandle handle_;
};

TEST_F(DrainTest, FinishesWhatIsInFlightAndRefusesTheRest) {
  const auto admin_channel = served_->ConnectAdmin();
  EXPECT_EQ(Health(admin_channel, ""), kServing);
  EXPECT_EQ(Health(channel_, ""), kServing);

  std::future<std::string> answer = std::async(std::launch::async, [this] {
    v1::AttendResponse response;
    const auto attention = v1::AttentionService::NewStub(served_->Connect());
    const grpc::Status status = attention->Attend(
        NewContext().get(), MakeAttend(served_->model(), handle_, 0, 0, {0}), &response);
    return ErrorText(status) + " " + RowErrorText(response.results(0));
  });
  attending_.get_future().wait();
  std::future<void> drain =
      std::async(std::launch::async, [this] { served_->server()->Drain(60'000); });

  // The calls here are repeated until the drain has begun; a repeat of a Create names the same
  // sequence.
  EXPECT_TRUE(Eventually([&] { return Health(admin_channel, "") == kNotServing; }));
  EXPECT_EQ(Health(admin_channel, "kvservice.v1.AttentionService"), kNotServing);
  EXPECT_EQ(Health(admin_channel, "kvservice.liveness"), kServing);
  v1::GetRequest get;
  *get.mutable_handle() = handle_;
  v1::GetResponse got;
  EXPECT_EQ(ErrorText(sequences_->Get(NewContext().get(), get, &got)), "UNAVAILABLE DRAINING");
  v1::GetServerInfoResponse info;
  EXPECT_TRUE(
      v1::AdminService::NewStub(admin_channel)->GetServerInfo(NewContext().get(), {}, &info).ok());
  EXPECT_TRUE(info.draining());
  EXPECT_EQ(answer.wait_for(std::chrono::seconds(0)), std::future_status::timeout);

  go_.set_value();
  EXPECT_EQ(answer.get(), "OK OK");
  drain.get();
  EXPECT_EQ(sequences_->Get(NewContext().get(), get, &got).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

TEST_F(DrainTest, EndsStreamsWhenTheGraceIsOver) {
  v1::AppendResponse response;
  const auto context = NewContext();
  const auto writer = sequences_->Append(context.get(), &response);
  EXPECT_TRUE(writer->Write(MakeAppend(served_->model(), handle_, 0, 0, {0, 1, 2})));
  EXPECT_TRUE(Eventually([&] { return served_->engine()->Stats().pool_bytes_used > 0; }));
  served_->server()->Drain(1);
  EXPECT_FALSE(writer->Finish().ok());
}

TEST_F(DrainTest, CanBeAskedForThroughTheAdminSide) {
  const auto admin = v1::AdminService::NewStub(served_->ConnectAdmin());
  v1::DrainRequest request;
  request.set_grace_ms(1234);
  v1::DrainResponse response;
  EXPECT_EQ(ErrorText(admin->Drain(NewContext().get(), request, &response)), "OK");
  EXPECT_EQ(served_->server()->WaitForDrainRequest(), 1234U);
}

// What a raw connection hears: true for HTTP/2 settings, false for a reset or an end.
bool IsServed(const FileDescriptor& connection) {
  char byte = 0;
  return recv(connection.get(), &byte, 1, 0) == 1;
}

TEST(ConnectionsTest, AreResetAboveTheCapAndServedAgainBelowIt) {
  ServedEngineOptions options;
  options.server.connections_max = 3;
  ServedEngine served(std::move(options));
  const std::string path = served.server()->endpoints()[0].path;
  std::vector<FileDescriptor> connections;
  for (int i = 0; i < 3; ++i) {
    connections.push_back(ConnectSocket(path));
    EXPECT_TRUE(IsServed(connections.back()));
  }
  EXPECT_FALSE(IsServed(ConnectSocket(path)));
  EXPECT_FALSE(IsServed(ConnectSocket(path)));
  connections.pop_back();
  // A full table is searched once in a while, as the clock says.
  EXPECT_TRUE(Eventually([&] {
    served.clock()->AdvanceMs(1000);
    return IsServed(ConnectSocket(path));
  }));
}

// Accepts nothing while told so, as when the process is out of file descriptors.
class ExhaustedTransport final : public Transport {
 public:
  absl::StatusOr<std::unique_ptr<Listener>> Listen(const Endpoint& endpoint) override {
    absl::StatusOr<std::unique_ptr<Listener>> inner = SystemTransport()->Listen(endpoint);
    if (!inner.ok()) return inner.status();
    return std::make_unique<ExhaustedListener>(*std::move(inner), this);
  }
  void set_exhausted(bool exhausted) { exhausted_ = exhausted; }
  uint32_t refused_count() const { return refused_count_; }

 private:
  class ExhaustedListener final : public Listener {
   public:
    ExhaustedListener(std::unique_ptr<Listener> inner, ExhaustedTransport* transport)
        : inner_(std::move(inner)), transport_(transport) {}
    const Endpoint& endpoint() const override { return inner_->endpoint(); }
    int poll_fd() const override { return inner_->poll_fd(); }
    absl::StatusOr<FileDescriptor> Accept() override {
      if (!transport_->exhausted_) return inner_->Accept();
      ++transport_->refused_count_;
      return absl::ResourceExhaustedError("out of file descriptors");
    }

   private:
    const std::unique_ptr<Listener> inner_;
    ExhaustedTransport* const transport_;
  };

  std::atomic<bool> exhausted_{false};
  std::atomic<uint32_t> refused_count_{0};
};

// gRPC's own accept loop never recovers from this.
TEST(ConnectionsTest, RunningOutOfDescriptorsHealsByItself) {
  ExhaustedTransport transport;
  ServedEngineOptions options;
  options.transport = &transport;
  ServedEngine served(std::move(options));
  const auto before = served.Connect();
  EXPECT_EQ(Health(before, ""), kServing);

  transport.set_exhausted(true);
  const FileDescriptor waiting = ConnectSocket(served.server()->endpoints()[0].path);
  EXPECT_TRUE(Eventually([&] { return transport.refused_count() >= 4; }));
  EXPECT_EQ(Health(before, ""), kServing);
  transport.set_exhausted(false);
  EXPECT_TRUE(IsServed(waiting));
  EXPECT_EQ(Health(served.Connect(), ""), kServing);
}

TEST(ServerTest, RefusesWhatOtherHostsCouldReach) {
  TestEngine engine;
  ServerOptions options;
  options.listen = {*ParseListenAddress("0.0.0.0:0")};
  const auto server =
      NewServer(options, engine.get(),
                {.clock = &engine.clock, .random = &engine.random, .transport = SystemTransport()});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ServerTest, ServesLoopbackTcp) {
  TestEngine engine;
  ServerOptions options;
  options.listen = {*ParseListenAddress("127.0.0.1:0"), *ParseListenAddress("[::1]:0")};
  const auto server =
      NewServer(options, engine.get(),
                {.clock = &engine.clock, .random = &engine.random, .transport = SystemTransport()});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->admin_endpoint(), std::nullopt);
  for (const Endpoint& endpoint : (*server)->endpoints()) {
    EXPECT_NE(endpoint.port, 0);
    EXPECT_EQ(Health(ConnectTo(endpoint), ""), kServing) << endpoint.ToString();
  }
}

}  // namespace
}  // namespace kvservice::testing
