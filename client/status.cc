#include "client/status.h"

#include <algorithm>
#include <array>
#include <limits>

#include "absl/strings/cord.h"
#include "absl/types/optional.h"
#include "client/error.h"
#include "kvservice/v1/error_details.pb.h"

namespace kvservice::client {
namespace {

constexpr char kErrorInfo[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kBadRequest[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kRetryInfo[] = "type.googleapis.com/google.rpc.RetryInfo";
constexpr std::array<std::string_view, 3> kKnown = {kErrorInfo, kBadRequest, kRetryInfo};

constexpr int64_t kMillisecondsPerSecond = 1'000;
constexpr int32_t kNanosecondsPerMillisecond = 1'000'000;
// A server that asks for more is not worth waiting for; also keeps the arithmetic in range.
constexpr int64_t kRetryDelaySecondsMax = 24 * 3600;

// Nothing if the payload is absent or is not what its type says.
template <typename Detail>
std::optional<Detail> DetailOf(const absl::Status& status, const char* type) {
  const absl::optional<absl::Cord> payload = status.GetPayload(type);
  if (!payload.has_value()) return std::nullopt;
  Detail detail;
  if (!detail.ParseFromString(std::string(*payload))) return std::nullopt;
  return detail;
}

template <typename Detail>
void AddDetail(const char* type, const Detail& detail, absl::Status* status) {
  status->SetPayload(type, absl::Cord(detail.SerializeAsString()));
}

absl::Status BareStatus(int code, std::string_view message) {
  return {static_cast<absl::StatusCode>(code), {message.data(), message.size()}};
}

}  // namespace

std::string ReasonOf(const absl::Status& status) {
  const std::optional<v1::ErrorInfo> info = DetailOf<v1::ErrorInfo>(status, kErrorInfo);
  return info.has_value() ? info->reason() : std::string();
}

std::string FieldOf(const absl::Status& status) {
  const std::optional<v1::BadRequest> bad = DetailOf<v1::BadRequest>(status, kBadRequest);
  if (!bad.has_value() || bad->field_violations().empty()) return {};
  return bad->field_violations(0).field();
}

std::map<std::string, std::string> MetadataOf(const absl::Status& status) {
  const std::optional<v1::ErrorInfo> info = DetailOf<v1::ErrorInfo>(status, kErrorInfo);
  if (!info.has_value()) return {};
  return {info->metadata().begin(), info->metadata().end()};
}

std::optional<std::chrono::milliseconds> RetryDelayOf(const absl::Status& status) {
  const std::optional<v1::RetryInfo> retry = DetailOf<v1::RetryInfo>(status, kRetryInfo);
  if (!retry.has_value() || !retry->has_retry_delay()) return std::nullopt;
  const int64_t seconds =
      std::clamp<int64_t>(retry->retry_delay().seconds(), 0, kRetryDelaySecondsMax);
  const int32_t nanos = std::max(0, retry->retry_delay().nanos());
  return std::chrono::milliseconds(seconds * kMillisecondsPerSecond +
                                   nanos / kNanosecondsPerMillisecond);
}

absl::Status MakeError(int code, std::string_view message, const std::string& reason,
                       const std::string& field,
                       const std::map<std::string, std::string>& metadata) {
  absl::Status status = BareStatus(code, message);
  v1::ErrorInfo info;
  info.set_reason(reason);
  info.set_domain("kvservice");
  info.mutable_metadata()->insert(metadata.begin(), metadata.end());
  AddDetail(kErrorInfo, info, &status);
  if (!field.empty()) {
    v1::BadRequest bad;
    v1::BadRequest::FieldViolation* const violation = bad.add_field_violations();
    violation->set_field(field);
    violation->set_description(std::string(message));
    AddDetail(kBadRequest, bad, &status);
  }
  return status;
}

absl::Status InvalidRequest(const std::string& field, std::string_view problem) {
  return MakeError(static_cast<int>(absl::StatusCode::kInvalidArgument),
                   field + " " + std::string(problem), kRequestInvalid, field);
}

absl::Status MalformedReply(const std::string& field, std::string_view problem) {
  return MakeError(static_cast<int>(absl::StatusCode::kInternal),
                   "the reply's " + field + " " + std::string(problem), kReplyMalformed, field);
}

absl::Status StatusFromWire(int code, std::string_view message, const std::string& details) {
  absl::Status status = BareStatus(code, message);
  v1::Status rpc;
  if (status.ok() || !rpc.ParseFromString(details)) return status;
  for (const google::protobuf::Any& detail : rpc.details()) {
    if (std::find(kKnown.begin(), kKnown.end(), detail.type_url()) == kKnown.end()) continue;
    status.SetPayload(detail.type_url(), absl::Cord(detail.value()));
  }
  return status;
}

}  // namespace kvservice::client
