// The errors that several engine calls share, so that each has one reason and one text. Pure
// functions; any thread.

#ifndef KVSERVICE_KVSERVICE_ENGINE_ERRORS_H_
#define KVSERVICE_KVSERVICE_ENGINE_ERRORS_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/status.h"

namespace kvservice {

// NOT_FOUND / SEQUENCE_NOT_FOUND. Takes nothing: unknown, expired and foreign handles must look
// alike.
absl::Status SequenceNotFound();
// NOT_FOUND / MODEL_NOT_FOUND.
absl::Status ModelNotFound(std::string_view name);
// FAILED_PRECONDITION / GENERATION_MISMATCH with current_generation.
absl::Status GenerationMismatch(std::string_view field, uint64_t got, uint64_t current);
// INVALID_ARGUMENT / LAYER_OUT_OF_RANGE.
absl::Status LayerOutOfRange(uint32_t layer, uint32_t layer_count);
// OUT_OF_RANGE / POSITION_GAP with current_length: something beyond the stored tokens was named.
absl::Status PositionGap(std::string_view field, uint64_t position, uint32_t current_length);
// OUT_OF_RANGE / LENGTH_OUT_OF_RANGE with current_length.
absl::Status LengthOutOfRange(uint32_t length, uint32_t current_length);
// FAILED_PRECONDITION / APPEND_CONFLICT with current_length.
absl::Status AppendConflict(std::string_view field, uint32_t position, uint32_t current_length);
// RESOURCE_EXHAUSTED / SEQUENCE_TOO_LONG.
absl::Status SequenceTooLong(std::string_view field, uint64_t length, uint32_t tokens_max);
// RESOURCE_EXHAUSTED / POOL_FULL with a retry delay: sequences end all the time.
// `bytes_held` are free and kept for other tenants.
absl::Status PoolFull(size_t bytes_used, size_t bytes, size_t bytes_held);
// RESOURCE_EXHAUSTED / TENANT_QUOTA with a retry delay: the tenant has as much as it may, of the
// pool or of the disk.
absl::Status TenantPoolFull(uint64_t bytes_used, uint64_t bytes_max);
absl::Status TenantDiskFull(uint64_t bytes_used, uint64_t bytes_max);
// What an error of a call that needed blocks says is full.
enum class Lack : uint8_t { kNone, kPool, kTenantPool };
Lack LackOf(const absl::Status& status);
// RESOURCE_EXHAUSTED / OVERLOADED with a retry delay.
absl::Status Overloaded(uint32_t queue_calls_max);
// DATA_LOSS / SEQUENCE_LOST: the disk tier has it no longer, or not as it was. To its owner only.
absl::Status SequenceLost();
// FAILED_PRECONDITION / SEQUENCE_SUSPENDED and SEQUENCE_NOT_SUSPENDED.
absl::Status SequenceSuspended();
absl::Status SequenceNotSuspended();
// UNAVAILABLE / SEQUENCE_ON_DISK with a retry delay: it is being moved.
absl::Status SequenceOnDisk();
// FAILED_PRECONDITION / NO_DISK_TIER: the server has no data directory.
absl::Status NoDiskTier(std::string_view field);
// RESOURCE_EXHAUSTED / DISK_FULL or DISK_BUSY with a retry delay.
absl::Status DiskFull(uint64_t bytes_used, uint64_t bytes_max);
absl::Status DiskBusy();
// RESOURCE_EXHAUSTED / VERIFY_RUNNING with a retry delay: one look through the store at a time.
absl::Status VerifyRunning();
// UNAVAILABLE / DISK_FAILED: a write has failed, and nothing is written any more.
absl::Status DiskFailed();
// FAILED_PRECONDITION / SEQUENCE_GREW: what was sent to another server is not all of it any more.
absl::Status SequenceGrew();
// UNAVAILABLE / DRAINING.
absl::Status Draining();
// UNAVAILABLE / RANDOM_UNAVAILABLE.
absl::Status RandomUnavailable();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ENGINE_ERRORS_H_
