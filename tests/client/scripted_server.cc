#include "tests/client/scripted_server.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <deque>
#include <limits>
#include <mutex>
#include <utility>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/error_details.pb.h"
#include "kvservice/v1/model.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"

namespace kvservice::testing {
namespace {

void AddDetail(const char* type, const google::protobuf::MessageLite& detail, v1::Status* status) {
  google::protobuf::Any* const any = status->add_details();
  any->set_type_url("type.googleapis.com/google.rpc." + std::string(type));
  any->set_value(detail.SerializeAsString());
}

grpc::Status ToGrpc(const ScriptedError& error) {
  const auto code = static_cast<grpc::StatusCode>(error.code);
  if (error.reason.empty()) return {code, "scripted"};
  v1::Status status;
  status.set_code(error.code);
  v1::ErrorInfo info;
  info.set_reason(error.reason);
  AddDetail("ErrorInfo", info, &status);
  if (error.retry_delay_ms > 0) {
    v1::RetryInfo retry;
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(error.retry_delay_ms * 1'000'000));
    AddDetail("RetryInfo", retry, &status);
  }
  return {code, "scripted", status.SerializeAsString()};
}

// Shared by the services. Thread-safe.
struct Script {
  grpc::Status Next() {
    const std::lock_guard<std::mutex> lock(mutex);
    ++call_count;
    if (errors.empty()) return grpc::Status::OK;
    const ScriptedError error = errors.front();
    errors.pop_front();
    return ToGrpc(error);
  }

  std::mutex mutex;
  uint32_t call_count = 0;
  std::deque<ScriptedError> errors;
  std::function<void(v1::AttendResponse*)> edit;
  std::vector<std::string> request_ids;
};

class Models final : public v1::ModelService::Service {
 public:
  explicit Models(Script* script) : script_(script) {}
  grpc::Status Register(grpc::ServerContext* /*context*/, const v1::RegisterRequest* /*request*/,
                        v1::RegisterResponse* response) override {
    response->set_fingerprint(7);
    return script_->Next();
  }

 private:
  Script* const script_;
};

class Sequences final : public v1::SequenceService::Service {
 public:
  explicit Sequences(Script* script) : script_(script) {}
  grpc::Status Create(grpc::ServerContext* /*context*/, const v1::CreateRequest* request,
                      v1::CreateResponse* response) override {
    {
      const std::lock_guard<std::mutex> lock(script_->mutex);
      script_->request_ids.push_back(request->request_id());
    }
    FillHandle('p', response->mutable_sequence());
    return script_->Next();
  }
  grpc::Status Fork(grpc::ServerContext* /*context*/, const v1::ForkRequest* /*request*/,
                    v1::ForkResponse* response) override {
    FillHandle('c', response->mutable_sequence());
    return script_->Next();
  }
  grpc::Status Drop(grpc::ServerContext* /*context*/, const v1::DropRequest* /*request*/,
                    v1::DropResponse* /*response*/) override {
    return script_->Next();
  }

 private:
  static void FillHandle(char name, v1::Sequence* sequence) {
    sequence->mutable_handle()->set_id(std::string(16, name));
    sequence->mutable_handle()->set_generation(1);
  }
  Script* const script_;
};

class Attention final : public v1::AttentionService::Service {
 public:
  explicit Attention(Script* script) : script_(script) {}
  grpc::Status Attend(grpc::ServerContext* /*context*/, const v1::AttendRequest* request,
                      v1::AttendResponse* response) override {
    response->set_step_id(request->step_id());
    const auto heads = static_cast<int>(request->q().shape(1));
    FillTensor(request->q(), 3, response->mutable_out());
    FillTensor(request->q(), 2, response->mutable_lse());
    for (const v1::AttendRow& row : request->rows()) {
      FillRow(row, heads * static_cast<int>(row.query_count()), response->add_results());
    }
    {
      const std::lock_guard<std::mutex> lock(script_->mutex);
      if (script_->edit) script_->edit(response);
    }
    return script_->Next();
  }

 private:
  static void FillTensor(const v1::Tensor& q, int rank, v1::Tensor* tensor) {
    size_t elements = 1;
    for (int i = 0; i < rank; ++i) {
      tensor->add_shape(q.shape(i));
      elements *= static_cast<size_t>(q.shape(i));
    }
    tensor->set_dtype(v1::DATA_TYPE_FLOAT32);
    tensor->set_data(std::string(elements * sizeof(float), '\0'));
  }

  static void FillRow(const v1::AttendRow& row, int count, v1::AttendRowResult* result) {
    result->set_attended_tokens(row.position() + row.query_count());
    result->set_selector(v1::SELECTOR_DENSE);
    result->set_generation(row.handle().generation());
    v1::GroupReports* const groups = result->mutable_groups();
    groups->add_action(v1::ACTION_DENSE);
    groups->add_scanned(false);
    groups->add_tokens_read(result->attended_tokens());
    groups->add_tokens_scanned(0);
    groups->add_similarity(-2.0F);
    groups->add_keys_sampled(0);
    groups->add_rows_sampled(0);
    v1::Certificates* const certificates = result->mutable_certificates();
    for (int i = 0; i < count; ++i) {
      certificates->add_level(v1::LEVEL_EXACT);
      certificates->add_action(v1::ACTION_DENSE);
      certificates->add_met(true);
      certificates->add_dropped_mass_upper(0.0F);
      certificates->add_dropped_mass_lower(0.0F);
      certificates->add_log_kept_lower(0.0);
      certificates->add_log_kept_upper(0.0);
      certificates->add_log_dropped_lower(-std::numeric_limits<double>::infinity());
      certificates->add_log_dropped_upper(-std::numeric_limits<double>::infinity());
      certificates->add_dropped_mass_estimate(-1.0F);
    }
  }

  Script* const script_;
};

}  // namespace

struct ScriptedServer::Impl {
  Script script;
  Models models{&script};
  Sequences sequences{&script};
  Attention attention{&script};
  std::unique_ptr<grpc::Server> server;
};

ScriptedServer::ScriptedServer(const std::string& endpoint) : impl_(std::make_unique<Impl>()) {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(endpoint, grpc::InsecureServerCredentials());
  builder.RegisterService(&impl_->models);
  builder.RegisterService(&impl_->sequences);
  builder.RegisterService(&impl_->attention);
  impl_->server = builder.BuildAndStart();
  EXPECT_NE(impl_->server, nullptr);
}

ScriptedServer::~ScriptedServer() {
  impl_->server->Shutdown(std::chrono::system_clock::now());
  impl_->server->Wait();
}

void ScriptedServer::FailNext(std::vector<ScriptedError> errors) {
  const std::lock_guard<std::mutex> lock(impl_->script.mutex);
  impl_->script.errors.assign(errors.begin(), errors.end());
}

void ScriptedServer::EditAttend(std::function<void(v1::AttendResponse*)> edit) {
  const std::lock_guard<std::mutex> lock(impl_->script.mutex);
  impl_->script.edit = std::move(edit);
}

uint32_t ScriptedServer::call_count() const {
  const std::lock_guard<std::mutex> lock(impl_->script.mutex);
  return impl_->script.call_count;
}

std::vector<std::string> ScriptedServer::request_ids() const {
  const std::lock_guard<std::mutex> lock(impl_->script.mutex);
  return impl_->script.request_ids;
}

}  // namespace kvservice::testing
