#include "kvservice/server/status.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>

#include <algorithm>
#include <string>

#include "absl/strings/match.h"
#include "google/protobuf/any.pb.h"
#include "google/protobuf/message_lite.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

// Details travel in a trailer, and clients accept 8 KiB of trailers by default.
constexpr size_t kMessageBytesMax = 1024;
constexpr size_t kMetadataEntriesMax = 16;
constexpr size_t kMetadataValueBytesMax = 128;
// Longer pauses that another server asks for are taken as this.
constexpr int64_t kRetryDelayMsMax = 60'000;

// Cuts at a character boundary: a proto string must stay valid UTF-8.
std::string Truncated(std::string_view text, size_t bytes_max) {
  if (text.size() <= bytes_max) return std::string(text);
  size_t end = bytes_max;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) --end;
  return std::string(text.substr(0, end));
}

void AddDetail(const char* type, const google::protobuf::MessageLite& detail, v1::Status* status) {
  google::protobuf::Any* any = status->add_details();
  any->set_type_url("type.googleapis.com/google.rpc." + std::string(type));
  detail.SerializeToString(any->mutable_value());
}

v1::Status RpcStatus(const absl::Status& status, const ErrorDetails& details,
                     const std::string& message) {
  v1::Status rpc;
  rpc.set_code(static_cast<int>(status.code()));
  rpc.set_message(message);

  v1::ErrorInfo info;
  info.set_reason(details.reason.empty() ? absl::StatusCodeToString(status.code())
                                         : details.reason);
  info.set_domain("kvservice");
  const size_t entries = std::min(details.metadata.size(), kMetadataEntriesMax);
  for (size_t i = 0; i < entries; ++i) {
    const auto& [key, value] = details.metadata[i];
    (*info.mutable_metadata())[key] = Truncated(value, kMetadataValueBytesMax);
  }
  AddDetail("ErrorInfo", info, &rpc);

  if (!details.field.empty()) {
    v1::BadRequest bad_request;
    v1::BadRequest::FieldViolation* violation = bad_request.add_field_violations();
    violation->set_field(details.field);
    violation->set_description(Truncated(message, kMetadataValueBytesMax));
    AddDetail("BadRequest", bad_request, &rpc);
  }
  if (details.retry_delay_ms > 0) {
    v1::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(details.retry_delay_ms / 1000);
    retry.mutable_retry_delay()->set_nanos(
        static_cast<int32_t>(details.retry_delay_ms % 1000 * 1'000'000));
    AddDetail("RetryInfo", retry, &rpc);
  }
  return rpc;
}

}  // namespace

v1::Status StatusToProto(const absl::Status& status) {
  return RpcStatus(status, DetailsOf(status),
                   Truncated({status.message().data(), status.message().size()}, kMessageBytesMax));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  ErrorDetails details;
  v1::Status rpc;
  if (!rpc.ParseFromString(status.error_details())) rpc.Clear();
  for (const google::protobuf::Any& any : rpc.details()) {
    v1::ErrorInfo info;
    v1::BadRequest bad_request;
    v1::RetryInfo retry;
    if (absl::EndsWith(any.type_url(), "google.rpc.ErrorInfo") &&
        info.ParseFromString(any.value())) {
      details.reason = info.reason();
      details.metadata.assign(info.metadata().begin(), info.metadata().end());
    } else if (absl::EndsWith(any.type_url(), "google.rpc.BadRequest") &&
               bad_request.ParseFromString(any.value()) &&
               bad_request.field_violations_size() > 0) {
      details.field = bad_request.field_violations(0).field();
    } else if (absl::EndsWith(any.type_url(), "google.rpc.RetryInfo") &&
               retry.ParseFromString(any.value())) {
      const int64_t ms =
          retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1'000'000;
      details.retry_delay_ms = static_cast<uint32_t>(std::clamp<int64_t>(ms, 0, kRetryDelayMsMax));
    }
  }
  return MakeError(static_cast<absl::StatusCode>(status.error_code()), status.error_message(),
                   details);
}

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::ServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  const ErrorDetails details = DetailsOf(status);
  const std::string message =
      Truncated({status.message().data(), status.message().size()}, kMessageBytesMax);
  if (details.retry_delay_ms > 0) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms", std::to_string(details.retry_delay_ms));
  }
  return {static_cast<grpc::StatusCode>(status.code()), message,
          RpcStatus(status, details, message).SerializeAsString()};
}

}  // namespace kvservice
