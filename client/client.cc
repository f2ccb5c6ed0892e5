#include "client/client.h"

#include <sys/random.h>

#include <array>
#include <cassert>
#include <chrono>
#include <optional>
#include <string_view>
#include <utility>

#include "client/channel_credentials.h"
#include "client/core.h"
#include "client/error.h"
#include "client/payload_message.h"
#include "client/replies.h"
#include "client/requests.h"

namespace kvservice::client {
namespace {

constexpr std::string_view kUnixPrefix = "unix:/";

bool MayBeEndpoint(std::string_view endpoint) {
  if (endpoint.substr(0, kUnixPrefix.size()) == kUnixPrefix) return true;
  return endpoint.find('/') == std::string_view::npos &&
         endpoint.find(':') != std::string_view::npos;
}

// 32 hexadecimal digits.
absl::StatusOr<std::string> RandomName() {
  std::array<unsigned char, 16> bytes;
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return absl::UnavailableError("the system gives no random bytes");
  }
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string name;
  for (const unsigned char byte : bytes) {
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15U];
  }
  return name;
}

// Takes the tensors out of a request for as long as it lives: what a lane needs of them is not what
// a message has.
class WithoutTensors {
 public:
  explicit WithoutTensors(v1::AttendRequest* request)
      : request_(request),
        q_(request->release_q()),
        k_(request->release_k()),
        v_(request->release_v()) {}
  ~WithoutTensors() {
    request_->set_allocated_q(q_.release());
    request_->set_allocated_k(k_.release());
    request_->set_allocated_v(v_.release());
  }
  WithoutTensors(const WithoutTensors&) = delete;
  WithoutTensors& operator=(const WithoutTensors&) = delete;

 private:
  v1::AttendRequest* const request_;
  // nullptr where there is none.
  std::unique_ptr<v1::Tensor> q_, k_, v_;
};

PayloadMessage MessageOf(const AttendStep& step, const v1::AttendRequest* request) {
  PayloadMessage message(request);
  message.Add(v1::AttendRequest::kQFieldNumber, step.q);
  if (!step.k.empty()) message.Add(v1::AttendRequest::kKFieldNumber, step.k);
  if (!step.v.empty()) message.Add(v1::AttendRequest::kVFieldNumber, step.v);
  return message;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  if (!MayBeEndpoint(options.endpoint)) {
    return InvalidRequest(
        "endpoint", "is '" + options.endpoint + "', expected unix:/absolute/path or HOST:PORT");
  }
  if (absl::Status tls = CheckTls(options.endpoint, options.tls); !tls.ok()) return tls;
  absl::StatusOr<std::string> name = RandomName();
  if (!name.ok()) return name.status();
  auto core = std::make_unique<Core>(options);
  core->request_id_prefix = *std::move(name) + "-";
  if (!core->rpc->WaitUntilConnected(options.deadlines.connect)) {
    return MakeError(static_cast<int>(absl::StatusCode::kUnavailable),
                     "nobody answered at " + options.endpoint + " within " +
                         std::to_string(options.deadlines.connect.count()) + " ms",
                     kServerUnreachable, {}, {{"endpoint", options.endpoint}});
  }
  if (options.transport == Transport::kAuto || options.transport == Transport::kLane) {
    const absl::Status opened = core->lane.Open();
    if (!opened.ok() && options.transport == Transport::kLane) return opened;
  }
  return std::unique_ptr<Client>(new Client(std::move(core)));
}

Client::Client(std::unique_ptr<Core> core) : core_(std::move(core)) {}

Client::~Client() { assert(core_->borrowers == 0); }

Transport Client::transport() const {
  if (core_->lane.Get() != nullptr) return Transport::kLane;
  const bool streams = core_->options.transport != Transport::kUnary && core_->streams.is_served();
  return streams ? Transport::kStream : Transport::kUnary;
}

absl::StatusOr<uint64_t> Client::RegisterModel(const ModelDescription& model) {
  v1::RegisterRequest request;
  *request.mutable_model() = ModelToProto(model);
  v1::RegisterResponse response;
  const absl::Status status = core_->rpc->Register(request, &response);
  if (!status.ok()) return status;
  return response.fingerprint();
}

absl::StatusOr<Sequence> Client::CreateSequence(const SequenceOptions& options) {
  v1::CreateRequest request;
  request.set_model(options.model);
  request.set_lease_ms(options.lease_ms);
  if (options.policy) *request.mutable_policy() = PolicyToProto(*options.policy);
  request.mutable_token_ids()->Add(options.token_ids.begin(), options.token_ids.end());
  // Makes repeating harmless: a lost answer would otherwise leave a sequence behind.
  request.set_request_id(core_->request_id_prefix + std::to_string(core_->requests++));
  v1::CreateResponse response;
  absl::Status status = core_->rpc->Create(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), {});
  if (!status.ok()) return status;
  const v1::SequenceHandle& handle = response.sequence().handle();
  return Sequence(core_.get(), handle.id(), handle.generation(), response.matched_tokens());
}

StepBuffers Client::NewStepBuffers(const StepShape& shape) { return {shape, core_->lane.Get()}; }

Sequence Client::Adopt(std::string id, uint64_t generation) {
  return {core_.get(), std::move(id), generation};
}

absl::Status Client::CheckSequences(const AttendStep& step) const {
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const Sequence* const sequence = step.rows[i].sequence;
    if (sequence != nullptr && sequence->core_ != nullptr && sequence->core_ != core_.get()) {
      return InvalidRequest("rows[" + std::to_string(i) + "].sequence", "is another client's");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<AttendResult> Client::Attend(const AttendStep& step) {
  const absl::Status status = CheckSequences(step);
  if (!status.ok()) return status;
  return client::Attend(core_.get(), step);
}

PendingAttend Client::AttendAsync(const AttendStep& step) {
  return {core_.get(), step, CheckSequences(step)};
}

absl::StatusOr<PreparedAttend> Client::PrepareAttend(const AttendStep& step) {
  const absl::Status status = CheckSequences(step);
  if (!status.ok()) return status;
  return PreparedAttend::Prepare(core_.get(), step);
}

absl::StatusOr<AttendResult> Attend(Core* core, const AttendStep& step) {
  v1::AttendRequest request;
  absl::Status status = StepToProto(step, &request);
  if (!status.ok()) return status;
  request.set_step_id(++core->steps);
  const auto deadline = std::chrono::steady_clock::now() + core->options.deadlines.data;
  if (const std::shared_ptr<Lane> lane = core->lane.Get(); lane != nullptr) {
    const std::optional<uint32_t> slot = lane->BeginAttend(step, &request);
    if (slot.has_value()) {
      auto answer = lane->EndAttend(*slot, request, step.buffers, deadline);
      if (answer.has_value()) return *std::move(answer);
    }
  }
  v1::AttendResponse response;
  std::optional<absl::Status> streamed;
  {
    const WithoutTensors control(&request);
    const PayloadMessage message = MessageOf(step, &request);
    if (core->options.transport != Transport::kUnary) {
      streamed = core->streams.Attend(message, deadline, &response);
    }
    status = streamed.has_value() ? *streamed : core->rpc->Attend(message, deadline, &response);
  }
  if (!status.ok()) return status;
  absl::Span<const std::byte> out;
  absl::StatusOr<AttendResult> result =
      ResultFromProto(request, response, {}, step.buffers != nullptr ? &out : nullptr);
  if (result.ok() && step.buffers != nullptr) step.buffers->KeepOutputs(out, false);
  if (result.ok() && streamed.has_value()) result->transport = Transport::kStream;
  return result;
}

}  // namespace kvservice::client
