#include "kvservice/engine_errors.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

// A sequence must end or be dropped first.
constexpr uint32_t kPoolRetryMs = 1000;
// About as long as a full queue takes to drain.
constexpr uint32_t kQueueRetryMs = 50;
// Tells a full pool from other quotas.
constexpr char kTenantPoolKey[] = "tenant_pool_bytes_max";

absl::Status TenantFull(const char* where, uint64_t bytes_used, uint64_t bytes_max,
                        const char* used_key, const char* max_key) {
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat("the tenant may have no more ", where, ": ", bytes_used, " of its ", bytes_max,
                   " bytes are in use"),
      {.reason = "TENANT_QUOTA",
       .field = "",
       .metadata = {{used_key, absl::StrCat(bytes_used)}, {max_key, absl::StrCat(bytes_max)}},
       .retry_delay_ms = kPoolRetryMs});
}

}  // namespace

absl::Status SequenceNotFound() {
  return MakeError(absl::StatusCode::kNotFound, "there is no such sequence",
                   {.reason = "SEQUENCE_NOT_FOUND", .field = "", .metadata = {}});
}

absl::Status ModelNotFound(std::string_view name) {
  const std::string text(name);
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("there is no model '", text, "'"),
                   {.reason = "MODEL_NOT_FOUND", .field = "model", .metadata = {{"model", text}}});
}

absl::Status GenerationMismatch(std::string_view field, uint64_t got, uint64_t current) {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("the sequence is at generation ", current, ", the handle at ", got),
                   {.reason = "GENERATION_MISMATCH",
                    .field = std::string(field),
                    .metadata = {{"generation", absl::StrCat(got)},
                                 {"current_generation", absl::StrCat(current)}}});
}

absl::Status LayerOutOfRange(uint32_t layer, uint32_t layer_count) {
  return MakeError(
      absl::StatusCode::kInvalidArgument,
      absl::StrCat("layer is ", layer, ", the model has ", layer_count),
      {.reason = "LAYER_OUT_OF_RANGE",
       .field = "layer",
       .metadata = {{"layer", absl::StrCat(layer)}, {"layer_count", absl::StrCat(layer_count)}}});
}

absl::Status PositionGap(std::string_view field, uint64_t position, uint32_t current_length) {
  return MakeError(
      absl::StatusCode::kOutOfRange,
      absl::StrCat("position ", position, " is beyond the layer's ", current_length, " tokens"),
      {.reason = "POSITION_GAP",
       .field = std::string(field),
       .metadata = {{"position", absl::StrCat(position)},
                    {"current_length", absl::StrCat(current_length)}}});
}

absl::Status LengthOutOfRange(uint32_t length, uint32_t current_length) {
  return MakeError(
      absl::StatusCode::kOutOfRange,
      absl::StrCat("length is ", length, ", the sequence has ", current_length, " tokens"),
      {.reason = "LENGTH_OUT_OF_RANGE",
       .field = "length_tokens",
       .metadata = {{"length", absl::StrCat(length)},
                    {"current_length", absl::StrCat(current_length)}}});
}

absl::Status AppendConflict(std::string_view field, uint32_t position, uint32_t current_length) {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("tokens from position ", position,
                                " are stored with other bytes; the layer has ", current_length),
                   {.reason = "APPEND_CONFLICT",
                    .field = std::string(field),
                    .metadata = {{"position", absl::StrCat(position)},
                                 {"current_length", absl::StrCat(current_length)}}});
}

absl::Status SequenceTooLong(std::string_view field, uint64_t length, uint32_t tokens_max) {
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat("the sequence would have ", length, " tokens, at most ", tokens_max,
                   " are allowed"),
      {.reason = "SEQUENCE_TOO_LONG",
       .field = std::string(field),
       .metadata = {{"length", absl::StrCat(length)}, {"tokens_max", absl::StrCat(tokens_max)}}});
}

absl::Status PoolFull(size_t bytes_used, size_t bytes, size_t bytes_held) {
  const std::string held =
      bytes_held == 0 ? "" : absl::StrCat(", ", bytes_held, " are kept for other tenants");
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("no room for another block: ", bytes_used, " of ", bytes,
                                " bytes are in use", held),
                   {.reason = "POOL_FULL",
                    .field = "",
                    .metadata = {{"pool_bytes_used", absl::StrCat(bytes_used)},
                                 {"pool_bytes_held", absl::StrCat(bytes_held)},
                                 {"pool_bytes", absl::StrCat(bytes)}},
                    .retry_delay_ms = kPoolRetryMs});
}

absl::Status TenantPoolFull(uint64_t bytes_used, uint64_t bytes_max) {
  return TenantFull("memory", bytes_used, bytes_max, "tenant_pool_bytes_used", kTenantPoolKey);
}

absl::Status TenantDiskFull(uint64_t bytes_used, uint64_t bytes_max) {
  return TenantFull("disk", bytes_used, bytes_max, "tenant_disk_bytes_used",
                    "tenant_disk_bytes_max");
}

Lack LackOf(const absl::Status& status) {
  if (status.code() != absl::StatusCode::kResourceExhausted) return Lack::kNone;
  const ErrorDetails details = DetailsOf(status);
  if (details.reason == "POOL_FULL") return Lack::kPool;
  const bool is_of_tenant =
      std::any_of(details.metadata.begin(), details.metadata.end(),
                  [](const auto& entry) { return entry.first == kTenantPoolKey; });
  return is_of_tenant ? Lack::kTenantPool : Lack::kNone;
}

absl::Status Overloaded(uint32_t queue_calls_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("all ", queue_calls_max, " places of the queue are taken"),
                   {.reason = "OVERLOADED",
                    .field = "",
                    .metadata = {{"queue_calls_max", absl::StrCat(queue_calls_max)}},
                    .retry_delay_ms = kQueueRetryMs});
}

absl::Status SequenceLost() {
  return MakeError(absl::StatusCode::kDataLoss,
                   "what the disk had of the sequence is damaged or gone",
                   {.reason = "SEQUENCE_LOST", .field = "", .metadata = {}});
}

absl::Status SequenceSuspended() {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   "the sequence is suspended; Resume brings it back",
                   {.reason = "SEQUENCE_SUSPENDED", .field = "", .metadata = {}});
}

absl::Status SequenceNotSuspended() {
  return MakeError(absl::StatusCode::kFailedPrecondition, "the sequence is not suspended",
                   {.reason = "SEQUENCE_NOT_SUSPENDED", .field = "", .metadata = {}});
}

absl::Status SequenceOnDisk() {
  return MakeError(
      absl::StatusCode::kUnavailable, "the sequence is on its way between memory and disk",
      {.reason = "SEQUENCE_ON_DISK", .field = "", .metadata = {}, .retry_delay_ms = kQueueRetryMs});
}

absl::Status NoDiskTier(std::string_view field) {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   "the server was started without --data-dir",
                   {.reason = "NO_DISK_TIER", .field = std::string(field), .metadata = {}});
}

absl::Status DiskFull(uint64_t bytes_used, uint64_t bytes_max) {
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat("no room on disk: ", bytes_used, " of ", bytes_max, " bytes are in use"),
      {.reason = "DISK_FULL",
       .field = "",
       .metadata = {{"disk_bytes_used", absl::StrCat(bytes_used)},
                    {"disk_bytes_max", absl::StrCat(bytes_max)}},
       .retry_delay_ms = kPoolRetryMs});
}

absl::Status VerifyRunning() {
  return MakeError(
      absl::StatusCode::kResourceExhausted, "somebody else has the store looked through",
      {.reason = "VERIFY_RUNNING", .field = "", .metadata = {}, .retry_delay_ms = kPoolRetryMs});
}

absl::Status DiskBusy() {
  return MakeError(
      absl::StatusCode::kResourceExhausted, "too much waits for the disk",
      {.reason = "DISK_BUSY", .field = "", .metadata = {}, .retry_delay_ms = kQueueRetryMs});
}

absl::Status DiskFailed() {
  return MakeError(absl::StatusCode::kUnavailable,
                   "a write to the disk has failed; nothing more is written until a restart",
                   {.reason = "DISK_FAILED", .field = "", .metadata = {}});
}

absl::Status SequenceGrew() {
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   "the sequence has changed since it was sent; it was not dropped",
                   {.reason = "SEQUENCE_GREW", .field = "move", .metadata = {}});
}

absl::Status Draining() {
  return MakeError(absl::StatusCode::kUnavailable, "the server is draining",
                   {.reason = "DRAINING", .field = "", .metadata = {}});
}

absl::Status RandomUnavailable() {
  return MakeError(absl::StatusCode::kUnavailable, "the random number source does not work",
                   {.reason = "RANDOM_UNAVAILABLE", .field = "", .metadata = {}});
}

}  // namespace kvservice
