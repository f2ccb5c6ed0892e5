// Stores rows of one sequence and layer, for Append and for the k and v of Attend. Executor thread.

#ifndef KVSERVICE_KVSERVICE_STORE_ROWS_H_
#define KVSERVICE_KVSERVICE_STORE_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvservice/cache/block_pool.h"
#include "kvservice/engine.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// Why the pool had no block for the owner just now: POOL_FULL or TENANT_QUOTA.
absl::Status NoBlockError(const BlockPool& pool, BlockOwner owner);

struct RowsToStore {
  uint32_t layer = 0;
  uint32_t position = 0;
  uint64_t count = 0;
  // [count][kv_head_count][head_dim] in the cache dtype, finite.
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
};

// POSITION_GAP, SEQUENCE_TOO_LONG, APPEND_CONFLICT, POOL_FULL or TENANT_QUOTA; nothing is then
// changed. Errors name the field `prefix` + "position". The bytes are there once `writes` have run.
absl::StatusOr<AppendResult> StoreRows(const EngineOptions& options, const BlockPool& pool,
                                       std::string_view prefix, const RowsToStore& rows,
                                       Sequence* sequence, PendingWrites* writes);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORE_ROWS_H_
