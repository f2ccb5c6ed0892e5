#include "tests/server/served_engine.h"

#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <utility>

#include "absl/status/status.h"
#include "attention/device.h"
#include "kvservice/server/convert.h"
#include "kvservice/v1/error_details.pb.h"

namespace kvservice::testing {
namespace {

constexpr std::chrono::seconds kDeadline{60};

std::string CodeName(int code) {
  return absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
}

std::string Text(int code, const std::string& reason, const std::string& field) {
  if (code == 0) return "OK";
  std::string text = CodeName(code);
  if (!reason.empty()) text += " " + reason;
  if (!field.empty()) text += " " + field;
  return text;
}

}  // namespace

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "kvservice-XXXXXX").string();
  EXPECT_NE(mkdtemp(pattern.data()), nullptr);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

RpcError ErrorOf(const grpc::Status& status) {
  RpcError error;
  error.code = status.error_code();
  error.message = status.error_message();
  v1::Status rpc;
  if (!rpc.ParseFromString(status.error_details())) return error;
  for (const google::protobuf::Any& detail : rpc.details()) {
    const std::string type = detail.type_url().substr(detail.type_url().rfind('.') + 1);
    if (type == "ErrorInfo") {
      v1::ErrorInfo info;
      EXPECT_TRUE(info.ParseFromString(detail.value()));
      EXPECT_EQ(info.domain(), "kvservice");
      error.reason = info.reason();
      error.metadata.insert(info.metadata().begin(), info.metadata().end());
    } else if (type == "BadRequest") {
      v1::BadRequest bad;
      EXPECT_TRUE(bad.ParseFromString(detail.value()));
      error.field = bad.field_violations(0).field();
    } else if (type == "RetryInfo") {
      v1::RetryInfo retry;
      EXPECT_TRUE(retry.ParseFromString(detail.value()));
      error.retry_delay_ms = static_cast<uint64_t>(retry.retry_delay().seconds()) * 1000 +
                             static_cast<uint64_t>(retry.retry_delay().nanos()) / 1'000'000;
    }
  }
  return error;
}

std::string ErrorText(const grpc::Status& status) {
  const RpcError error = ErrorOf(status);
  return Text(error.code, error.reason, error.field);
}

std::string RowErrorText(const v1::AttendRowResult& result) {
  return Text(result.code(), result.reason(), result.field());
}

std::shared_ptr<grpc::Channel> ConnectTo(const Endpoint& endpoint) {
  grpc::ChannelArguments arguments;
  // Channels of one process would otherwise share a connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetMaxReceiveMessageSize(-1);
  return grpc::CreateCustomChannel(endpoint.ToString(), grpc::InsecureChannelCredentials(),
                                   arguments);
}

ServedEngine::ServedEngine(ServedEngineOptions options)
    : engine_(std::make_unique<TestEngine>(options.engine, options.layer_count,
                                           std::move(options.device))) {
  const auto listen = [this](const std::string& name) {
    Endpoint endpoint;
    endpoint.path = folder_.path() + "/" + name;
    return endpoint;
  };
  ServerOptions server = std::move(options.server);
  server.engine = options.engine;
  server.listen.insert(
      server.listen.begin(),
      {{.endpoint = listen("data")}, {.tenant = kOtherTenant, .endpoint = listen("other")}});
  if (!server.admin_listen.has_value()) server.admin_listen = listen("admin");
  absl::StatusOr<std::unique_ptr<Server>> started =
      NewServer(server, engine_->get(),
                {.clock = &engine_->clock,
                 .random = &engine_->random,
                 .transport = options.transport == nullptr ? SystemTransport() : options.transport,
                 .access_log = options.access_log});
  EXPECT_TRUE(started.ok()) << started.status();
  server_ = *std::move(started);
}

ServedEngine::~ServedEngine() = default;

std::shared_ptr<grpc::Channel> ServedEngine::Connect() const {
  return ConnectTo(server_->endpoints()[0]);
}

std::shared_ptr<grpc::Channel> ServedEngine::ConnectAsOther() const {
  return ConnectTo(server_->endpoints()[1]);
}

std::shared_ptr<grpc::Channel> ServedEngine::ConnectAdmin() const {
  return ConnectTo(*server_->admin_endpoint());
}

std::unique_ptr<grpc::ClientContext> NewContext() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + kDeadline);
  return context;
}

v1::Tensor MakeTensor(DType dtype, std::vector<int64_t> shape,
                      const std::vector<std::byte>& bytes) {
  v1::Tensor tensor;
  tensor.set_dtype(DTypeToProto(dtype));
  tensor.mutable_shape()->Add(shape.begin(), shape.end());
  tensor.set_data(bytes.data(), bytes.size());
  return tensor;
}

namespace {

v1::Tensor MakePart(const ModelSpec& model, Part part, DType dtype, uint32_t layer,
                    const Words& words) {
  const KvLayout& layout = model.layout;
  const int64_t heads = part == Part::kQuery ? layout.query_head_count : layout.kv_head_count;
  return MakeTensor(dtype, {static_cast<int64_t>(words.size()), heads, layout.head_dim},
                    PartBytes(layout, dtype, part, layer, words));
}

}  // namespace

v1::AppendRequest MakeAppend(const ModelSpec& model, const v1::SequenceHandle& handle,
                             uint32_t layer, uint32_t position, const Words& words) {
  v1::AppendRequest request;
  *request.mutable_handle() = handle;
  request.set_layer(layer);
  request.set_position(position);
  *request.mutable_k() = MakePart(model, Part::kKey, model.layout.dtype, layer, words);
  *request.mutable_v() = MakePart(model, Part::kValue, model.layout.dtype, layer, words);
  return request;
}

v1::AttendRequest MakeAttend(const ModelSpec& model, const v1::SequenceHandle& handle,
                             uint32_t layer, uint32_t position, const Words& words) {
  v1::AttendRequest request;
  request.set_layer(layer);
  v1::AttendRow* const row = request.add_rows();
  *row->mutable_handle() = handle;
  row->set_position(position);
  row->set_query_count(static_cast<uint32_t>(words.size()));
  *request.mutable_q() = MakePart(model, Part::kQuery, DType::kFloat32, layer, words);
  *request.mutable_k() = MakePart(model, Part::kKey, model.layout.dtype, layer, words);
  *request.mutable_v() = MakePart(model, Part::kValue, model.layout.dtype, layer, words);
  return request;
}

}  // namespace kvservice::testing
