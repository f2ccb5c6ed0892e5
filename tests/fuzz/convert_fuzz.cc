// Requests as they come by gRPC: bytes that may be a message, taken apart into what the engine
// works on, or refused with a reason. What is accepted and has tensors is also written by the
// client's way, which must make the same message of it.
//
// Input: which message it is, then its bytes.

#include <cstdlib>
#include <optional>
#include <string>

#include "client/payload_message.h"
#include "client/tensor.h"
#include "kvservice/server/attend_run.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"
#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

void Expect(bool condition) {
  if (!condition) std::abort();
}

// Refusals are INVALID_ARGUMENT, or name something that is not there.
void ExpectTyped(const absl::Status& status) {
  Expect(status.ok() || absl::IsInvalidArgument(status) || absl::IsNotFound(status));
  Expect(status.ok() || !status.message().empty());
}

std::optional<client::TensorView> ViewOf(const TensorView& tensor) {
  if (tensor.shape.size() != 3) return std::nullopt;
  for (const int64_t extent : tensor.shape) {
    if (extent > UINT32_MAX) return std::nullopt;
  }
  client::TensorView view;
  view.dtype =
      tensor.dtype == DType::kFloat32
          ? client::DType::kFloat32
          : (tensor.dtype == DType::kFloat16 ? client::DType::kFloat16 : client::DType::kBfloat16);
  view.token_count = static_cast<uint32_t>(tensor.shape[0]);
  view.head_count = static_cast<uint32_t>(tensor.shape[1]);
  view.head_dim = static_cast<uint32_t>(tensor.shape[2]);
  view.bytes = tensor.bytes;
  return view;
}

// One tensor taken out of `message` and put back in the client's way. `tensor` is its view.
template <typename Message>
void ExpectSameMessage(const Message& message, int field_number, v1::Tensor* (Message::*release)(),
                       const TensorView& tensor) {
  const std::optional<client::TensorView> view = ViewOf(tensor);
  if (!view.has_value()) return;
  Message expected = message;
  expected.DiscardUnknownFields();
  Message control = expected;
  delete (control.*release)();
  client::PayloadMessage writer(&control);
  writer.Add(field_number, *view);
  std::string bytes(writer.bytes(), '\0');
  writer.Write(reinterpret_cast<uint8_t*>(bytes.data()));
  Message parsed;
  Expect(parsed.ParseFromString(bytes));
  Expect(parsed.SerializeAsString() == expected.SerializeAsString());
}

void RunAttend(const std::string& bytes, const PolicyRegistry& registry) {
  v1::AttendRequest request;
  if (!request.ParseFromString(bytes)) return;
  AttendRun run;
  const absl::Status status = PrepareAttend(request, registry, "", nullptr, &run);
  ExpectTyped(status);
  if (!status.ok()) return;
  ExpectSameMessage(request, v1::AttendRequest::kQFieldNumber, &v1::AttendRequest::release_q,
                    run.call.q);
}

void RunAppend(const std::string& bytes) {
  v1::AppendRequest request;
  if (!request.ParseFromString(bytes)) return;
  const absl::StatusOr<AppendCall> call = AppendFromProto(request, "", nullptr);
  ExpectTyped(call.status());
  if (!call.ok()) return;
  ExpectSameMessage(request, v1::AppendRequest::kKFieldNumber, &v1::AppendRequest::release_k,
                    call->k);
  ExpectSameMessage(request, v1::AppendRequest::kVFieldNumber, &v1::AppendRequest::release_v,
                    call->v);
}

void Run(const uint8_t* data, size_t size) {
  static const auto* const kRegistry = new PolicyRegistry;
  FuzzInput input(data, size);
  const auto kind = input.Take<uint8_t>();
  const std::string bytes = input.Rest();
  v1::Policy policy;
  v1::Model model;
  v1::AuditRequest audit;
  v1::ExplainRequest explain;
  switch (kind % 6) {
    case 0:
      return RunAttend(bytes, *kRegistry);
    case 1:
      return RunAppend(bytes);
    case 2:
      if (policy.ParseFromString(bytes)) {
        ExpectTyped(PolicyFromProto(policy, "policy", *kRegistry).status());
      }
      return;
    case 3:
      if (model.ParseFromString(bytes)) ExpectTyped(ModelFromProto(model, *kRegistry).status());
      return;
    case 4:
      if (audit.ParseFromString(bytes)) ExpectTyped(AuditFromProto(audit).status());
      return;
    default:
      if (explain.ParseFromString(bytes)) ExpectTyped(ExplainFromProto(explain).status());
      return;
  }
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run(data, size);
  return 0;
}
