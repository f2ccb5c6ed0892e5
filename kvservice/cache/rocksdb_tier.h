// The disk tier on RocksDB.
//
// Settings. The log is replayed up to its first damaged record (kTolerateCorruptedTailRecords): the
// default would hide acknowledged rows behind a flipped bit, the strictest mode refuses to open
// after every torn write; logs are never recycled. Whole values of 4 KiB and more go to blob files,
// so that compaction does not copy them; dead ones there are collected by Compact alone. Nothing is
// compressed: keys and values do not compress.
//
// Beside the database lies STATE, written by us and replaced atomically: whether the store is open
// or was closed, how often it was not, and the inventory of its rows. Damage that makes RocksDB
// forget rows without an error (a flipped bit in its manifest can) shows against the inventory, or,
// if there is none, when the database has forgotten that it was opened.

#ifndef KVSERVICE_KVSERVICE_CACHE_ROCKSDB_TIER_H_
#define KVSERVICE_KVSERVICE_CACHE_ROCKSDB_TIER_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvservice/cache/disk_tier.h"

namespace rocksdb {
class Env;
}  // namespace rocksdb

namespace kvservice {

struct RocksdbTierOptions {
  // Exists, or its parent does.
  std::string directory;
  // Memory for rows on their way to files, twice.
  size_t write_buffer_bytes = size_t{32} << 20;
  // Files, clock and threads of the store; borrowed, nullptr = the system's.
  rocksdb::Env* env = nullptr;
};

// FAILED_PRECONDITION / STORE_LOCKED if another process has it open, DATA_LOSS / STORE_DAMAGED if
// it cannot be opened as it is, FAILED_PRECONDITION / STORE_VERSION if another version wrote it,
// UNAVAILABLE / DISK_FAILED if the disk does not work.
absl::StatusOr<std::unique_ptr<DiskTier>> OpenRocksdbTier(const RocksdbTierOptions& options);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_ROCKSDB_TIER_H_
