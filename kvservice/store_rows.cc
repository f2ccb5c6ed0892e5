#include "kvservice/store_rows.h"

#include <string>

#include "kvservice/engine_errors.h"

namespace kvservice {
namespace {

// The name of the position is made only for errors: storing is the hot path.
std::string PositionField(std::string_view prefix) { return std::string(prefix) + "position"; }

}  // namespace

absl::Status NoBlockError(const BlockPool& pool, BlockOwner owner) {
  if (pool.why_not() == NoBlock::kPoolFull) {
    return PoolFull(pool.bytes_used(), pool.bytes(), pool.accounts().HeldFromOwner(owner));
  }
  const OwnerAccount account = pool.accounts().Of(owner);
  return TenantPoolFull(account.bytes, account.limits.bytes_max);
}

absl::StatusOr<AppendResult> StoreRows(const EngineOptions& options, const BlockPool& pool,
                                       std::string_view prefix, const RowsToStore& rows,
                                       Sequence* sequence, PendingWrites* writes) {
  const uint32_t length = sequence->length(rows.layer);
  if (rows.position > length) {
    return PositionGap(PositionField(prefix), rows.position, length);
  }
  const uint64_t end = rows.position + rows.count;
  if (end > options.sequence_tokens_max) {
    return SequenceTooLong(PositionField(prefix), end, options.sequence_tokens_max);
  }
  const AppendOutcome outcome = sequence->Append(
      rows.layer, rows.position, static_cast<uint32_t>(rows.count), rows.k, rows.v, writes);
  switch (outcome) {
    case AppendOutcome::kStored:
    case AppendOutcome::kDuplicate:
      break;
    case AppendOutcome::kGap:
      return PositionGap(PositionField(prefix), rows.position, length);
    case AppendOutcome::kConflict:
      return AppendConflict(PositionField(prefix), rows.position, length);
    case AppendOutcome::kPoolFull:
      return NoBlockError(pool, sequence->owner());
  }
  return AppendResult{.layer_length = sequence->length(rows.layer),
                      .duplicate = outcome == AppendOutcome::kDuplicate};
}

}  // namespace kvservice
