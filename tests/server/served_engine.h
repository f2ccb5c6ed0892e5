// A real server in this process, on Unix sockets in a temporary folder, with fakes behind it and
// raw stubs in front of it. Tokens are words (tests/kvservice/words.h).

#ifndef KVSERVICE_TESTS_SERVER_SERVED_ENGINE_H_
#define KVSERVICE_TESTS_SERVER_SERVED_ENGINE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kvservice/engine.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/server.h"
#include "kvservice/server/transport.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/sequence.pb.h"
#include "kvservice/v1/types.pb.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/fakes.h"
#include "tests/kvservice/words.h"

namespace grpc {
class ClientContext;
class Channel;
class Status;
}  // namespace grpc

namespace kvservice::testing {

inline constexpr char kOtherTenant[] = "acme";

// A folder that is removed with everything in it.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// What a failed call tells, as a client would take it apart.
struct RpcError {
  int code = 0;
  std::string message;
  std::string reason;
  std::string field;
  std::map<std::string, std::string> metadata;
  uint64_t retry_delay_ms = 0;
};
RpcError ErrorOf(const grpc::Status& status);
// "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q.shape"; "OK".
std::string ErrorText(const grpc::Status& status);
std::string RowErrorText(const v1::AttendRowResult& result);

struct ServedEngineOptions {
  EngineOptions engine = TestEngine::SmallOptions();
  // Listeners are added by ServedEngine: the data side's Unix sockets before those that are there,
  // the admin side's if there is none.
  ServerOptions server;
  AccessLog* access_log = nullptr;
  uint32_t layer_count = 2;
  std::unique_ptr<Device> device;
  // nullptr = the system's.
  Transport* transport = nullptr;
};

// A new connection.
std::shared_ptr<grpc::Channel> ConnectTo(const Endpoint& endpoint);

// The small model (two layers, 4 query heads on 2 KV heads of 64 channels) is registered.
class ServedEngine {
 public:
  explicit ServedEngine(ServedEngineOptions options = {});
  ~ServedEngine();

  // A new connection each.
  std::shared_ptr<grpc::Channel> Connect() const;
  std::shared_ptr<grpc::Channel> ConnectAsOther() const;
  std::shared_ptr<grpc::Channel> ConnectAdmin() const;
  const std::string& folder() const { return folder_.path(); }

  Server* server() const { return server_.get(); }
  Engine* engine() const { return engine_->get(); }
  const ModelSpec& model() const { return engine_->model(); }
  FakeClock* clock() const { return &engine_->clock; }

 private:
  TemporaryFolder folder_;
  std::unique_ptr<TestEngine> engine_;
  std::unique_ptr<Server> server_;
};

// A deadline far beyond anything a healthy server needs: a hang becomes a failure.
std::unique_ptr<grpc::ClientContext> NewContext();

v1::Tensor MakeTensor(DType dtype, std::vector<int64_t> shape, const std::vector<std::byte>& bytes);
// Keys and values of `words` at `position`.
v1::AppendRequest MakeAppend(const ModelSpec& model, const v1::SequenceHandle& handle,
                             uint32_t layer, uint32_t position, const Words& words);
// One row: the query of `word` at `position`, stored too.
v1::AttendRequest MakeAttend(const ModelSpec& model, const v1::SequenceHandle& handle,
                             uint32_t layer, uint32_t position, const Words& words);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_SERVED_ENGINE_H_
