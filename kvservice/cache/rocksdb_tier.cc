#include "kvservice/cache/rocksdb_tier.h"

#include <rocksdb/cache.h>
#include <rocksdb/convenience.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/file_checksum.h>
#include <rocksdb/file_system.h>
#include <rocksdb/sst_file_manager.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kvservice/cache/byte_codec.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr char kStateName[] = "/STATE";
constexpr char kStatePartialName[] = "/STATE.partial";
constexpr uint32_t kStateMagic = 0x5453564b;  // "KVST"
constexpr uint32_t kStateVersion = 1;
// Not a prefix of anybody's keys.
constexpr char kCountsKey[] =
    "\x01"
    "counts";
constexpr size_t kStateBytesMax = size_t{1} << 30;

constexpr size_t kBlobBytesMin = 4096;
constexpr uint64_t kBlobFileBytes = uint64_t{128} << 20;
constexpr size_t kBlockCacheBytes = size_t{16} << 20;
// Rows of files are opened when they are first read: an open does not wait for all of them.
constexpr int kOpenFilesMax = 512;
constexpr size_t kProtectionBytesPerKey = 8;
constexpr size_t kLogFileBytes = size_t{4} << 20;

absl::Status TierError(absl::StatusCode code, const char* reason, const std::string& message) {
  return MakeError(code, message, {.reason = reason, .field = "", .metadata = {}});
}

absl::Status DiskFailed(const std::string& what, const std::string& cause) {
  return TierError(absl::StatusCode::kUnavailable, "DISK_FAILED",
                   absl::StrCat("the disk tier cannot ", what, ": ", cause));
}

absl::Status StoreDamaged(const std::string& cause) {
  return TierError(absl::StatusCode::kDataLoss, "STORE_DAMAGED",
                   absl::StrCat("the store cannot be opened as it is: ", cause));
}

absl::Status RowLost(const rocksdb::Status& status) {
  return TierError(absl::StatusCode::kDataLoss, "ROW_LOST",
                   status.IsNotFound() ? "a stored row is missing" : "a stored row is damaged");
}

absl::Status ReadError(const rocksdb::Status& status) {
  const bool is_lost = status.IsNotFound() || status.IsCorruption() || status.IsPathNotFound() ||
                       status.IsInvalidArgument() || status.IsNotSupported();
  return is_lost ? RowLost(status) : DiskFailed("read", status.ToString());
}

// A disk that fails may be whole: nothing is known to be lost. While it opens, RocksDB reports some
// of its errors as corruption or wrong options, with the cause in the text at best; a CURRENT that
// cannot be opened looks to it like a disk that knows no direct I/O, which nobody asked for.
bool IsDiskError(const rocksdb::Status& status) {
  if (status.IsIOError()) return !status.IsPathNotFound();
  const std::string text = status.ToString();
  if (status.IsInvalidArgument() && absl::StrContains(text, "Direct I/O")) return true;
  return absl::StrContains(text, "IO error") && !absl::StrContains(text, "No such file");
}

absl::Status OpenError(const rocksdb::Status& status) {
  const std::string text = status.ToString();
  if (status.IsIOError() && absl::StrContains(text, "/LOCK")) {
    return TierError(absl::StatusCode::kFailedPrecondition, "STORE_LOCKED",
                     "the data directory is in use");
  }
  return IsDiskError(status) ? DiskFailed("open the store", text) : StoreDamaged(text);
}

enum class Phase : uint8_t { kCreating, kOpen, kClosed };

// How often the store was opened, and opened after it had not been closed. STATE and a row say so
// both: the one with fewer opens is a stale copy.
struct Counts {
  uint64_t opens = 0;
  uint64_t crashes = 0;
};

// The contents of STATE.
struct State {
  Phase phase = Phase::kCreating;
  Counts counts;
  std::string inventory;
};

std::string EncodeState(const State& state) {
  ByteWriter writer;
  writer.Number(kStateMagic);
  writer.Number(kStateVersion);
  writer.Number(state.phase);
  writer.Number(state.counts.opens);
  writer.Number(state.counts.crashes);
  writer.Text(state.inventory);
  std::string bytes = writer.Take();
  Seal(&bytes);
  return bytes;
}

// Nothing if it is damaged.
absl::StatusOr<std::optional<State>> DecodeState(std::string_view sealed) {
  const std::string_view bytes = Unseal(sealed);
  ByteReader reader(bytes);
  const auto magic = reader.Number<uint32_t>();
  const auto version = reader.Number<uint32_t>();
  if (reader.failed() || magic != kStateMagic) return std::nullopt;
  if (version != kStateVersion) {
    return TierError(
        absl::StatusCode::kFailedPrecondition, "STORE_VERSION",
        absl::StrCat("the store has format ", version, ", this server reads ", kStateVersion));
  }
  State state;
  state.phase = reader.Number<Phase>();
  state.counts.opens = reader.Number<uint64_t>();
  state.counts.crashes = reader.Number<uint64_t>();
  state.inventory = reader.Text();
  if (!reader.Finished() || state.phase > Phase::kClosed) return std::nullopt;
  return state;
}

// STATE of one directory.
class StateFile {
 public:
  StateFile(rocksdb::FileSystem* filesystem, std::string directory)
      : filesystem_(filesystem), directory_(std::move(directory)) {}

  bool Exists() const { return filesystem_->FileExists(directory_ + kStateName, {}, nullptr).ok(); }

  absl::StatusOr<std::optional<State>> Read() const {
    std::string bytes;
    const std::string path = directory_ + kStateName;
    std::unique_ptr<rocksdb::FSSequentialFile> file;
    rocksdb::IOStatus status = filesystem_->NewSequentialFile(path, {}, &file, nullptr);
    uint64_t size = 0;
    if (status.ok()) status = filesystem_->GetFileSize(path, {}, &size, nullptr);
    if (!status.ok()) return DiskFailed("read its state", status.ToString());
    if (size > kStateBytesMax) return std::nullopt;
    std::string scratch(size, '\0');
    while (bytes.size() < size) {
      rocksdb::Slice part;
      status = file->Read(size - bytes.size(), {}, &part, scratch.data(), nullptr);
      if (!status.ok()) return DiskFailed("read its state", status.ToString());
      if (part.empty()) break;
      bytes.append(part.data(), part.size());
    }
    return DecodeState(bytes);
  }

  absl::Status Write(const State& state) const {
    const std::string partial = directory_ + kStatePartialName;
    std::unique_ptr<rocksdb::FSWritableFile> file;
    std::unique_ptr<rocksdb::FSDirectory> directory;
    rocksdb::IOStatus status = filesystem_->NewWritableFile(partial, {}, &file, nullptr);
    if (status.ok()) status = file->Append(EncodeState(state), {}, nullptr);
    if (status.ok()) status = file->Fsync({}, nullptr);
    if (status.ok()) status = file->Close({}, nullptr);
    if (status.ok()) {
      status = filesystem_->RenameFile(partial, directory_ + kStateName, {}, nullptr);
    }
    if (status.ok()) status = filesystem_->NewDirectory(directory_, {}, &directory, nullptr);
    if (status.ok()) status = directory->FsyncWithDirOptions({}, nullptr, {});
    return status.ok() ? absl::OkStatus() : DiskFailed("write its state", status.ToString());
  }

 private:
  rocksdb::FileSystem* const filesystem_;
  const std::string directory_;
};

rocksdb::Options DatabaseOptions(const RocksdbTierOptions& tier, rocksdb::Env* env) {
  rocksdb::Options options;
  options.env = env;
  options.paranoid_checks = true;
  options.paranoid_file_checks = true;
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.recycle_log_file_num = 0;
  options.manual_wal_flush = false;
  options.allow_data_in_errors = false;
  options.memtable_protection_bytes_per_key = kProtectionBytesPerKey;
  options.file_checksum_gen_factory = rocksdb::GetFileChecksumGenCrc32cFactory();
  options.write_buffer_size = tier.write_buffer_bytes;
  options.max_write_buffer_number = 2;
  options.max_total_wal_size = 2 * tier.write_buffer_bytes;
  options.max_background_jobs = 2;
  options.max_open_files = kOpenFilesMax;
  options.compression = rocksdb::kNoCompression;
  options.enable_blob_files = true;
  options.min_blob_size = kBlobBytesMin;
  options.blob_file_size = kBlobFileBytes;
  options.blob_compression_type = rocksdb::kNoCompression;
  // Only Compact moves values: a compaction that meets a damaged one fails, and with it all
  // writing.
  options.enable_blob_garbage_collection = false;
  options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  options.keep_log_file_num = 4;
  options.max_log_file_size = kLogFileBytes;
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  // A cache of this store's own: another one would hide damage that came since.
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(kBlockCacheBytes);
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.sst_file_manager.reset(rocksdb::NewSstFileManager(env));
  return options;
}

class RocksdbTier final : public DiskTier {
 public:
  RocksdbTier(const RocksdbTierOptions& options, rocksdb::Env* env)
      : filesystem_(env->GetFileSystem()),
        directory_(options.directory),
        state_file_(filesystem_.get(), directory_),
        options_(DatabaseOptions(options, env)) {}
  ~RocksdbTier() override {
    if (database_ == nullptr) return;
    // Not Close: the next open must see that there was none.
    rocksdb::CancelAllBackgroundWork(database_.get(), true);
    database_->Close().PermitUncheckedError();
  }

  absl::Status Open();

  const ClosedStore& closed() const override { return closed_; }
  absl::Status Commit(absl::Span<const TierBatch> batches, bool is_synced) override;
  absl::StatusOr<std::string> Read(const std::string& key) const override;
  absl::Status Scan(
      const std::string& prefix,
      absl::FunctionRef<void(absl::string_view, absl::string_view)> visit) const override;
  uint64_t file_bytes() const override { return options_.sst_file_manager->GetTotalSize(); }
  absl::Status Compact() override;
  absl::Status Close(const std::string& inventory) override;

 private:
  absl::Status ReadState(bool has_state, bool has_database, State* state);
  absl::StatusOr<Counts> ReadCounts() const;
  absl::Status WriteCounts(const Counts& counts);
  absl::Status Fail(const char* what, const std::string& cause) {
    if (failure_.ok()) failure_ = DiskFailed(what, cause);
    return failure_;
  }

  const std::shared_ptr<rocksdb::FileSystem> filesystem_;
  const std::string directory_;
  const StateFile state_file_;
  const rocksdb::Options options_;

  std::unique_ptr<rocksdb::DB> database_;
  ClosedStore closed_;
  Counts counts_;
  // The first failure to write.
  absl::Status failure_;
};

// STATE comes first, so that a database that has vanished is not taken for one that never was.
absl::Status RocksdbTier::Open() {
  rocksdb::IOStatus made = filesystem_->CreateDirIfMissing(directory_, {}, nullptr);
  if (!made.ok()) return DiskFailed("make its directory", made.ToString());
  const bool has_database = filesystem_->FileExists(directory_ + "/CURRENT", {}, nullptr).ok();
  const bool has_state = state_file_.Exists();
  State state;
  absl::Status status = ReadState(has_state, has_database, &state);
  if (!status.ok()) return status;

  rocksdb::Options options = options_;
  options.create_if_missing = state.phase == Phase::kCreating;
  rocksdb::DB* opened = nullptr;
  const rocksdb::Status open = rocksdb::DB::Open(options, directory_, &opened);
  if (!open.ok()) return OpenError(open);
  database_.reset(opened);

  const absl::StatusOr<Counts> counted = ReadCounts();
  if (!counted.ok()) return counted.status();
  if (counted->opens > state.counts.opens) state.phase = Phase::kOpen;
  // The row is on disk before STATE is: the database has forgotten, and there is no inventory.
  if (counted->opens < state.counts.opens && state.phase == Phase::kOpen) {
    return StoreDamaged("rows that were on disk are gone");
  }
  counts_.opens = std::max(state.counts.opens, counted->opens) + 1;
  counts_.crashes = std::max(state.counts.crashes, counted->crashes);
  if (state.phase == Phase::kOpen) ++counts_.crashes;
  closed_.is_clean = state.phase == Phase::kClosed;
  if (closed_.is_clean) closed_.inventory = std::move(state.inventory);
  closed_.crash_count = counts_.crashes;
  status = WriteCounts(counts_);
  if (!status.ok()) return status;
  return state_file_.Write({.phase = Phase::kOpen, .counts = counts_, .inventory = {}});
}

absl::Status RocksdbTier::ReadState(bool has_state, bool has_database, State* state) {
  if (!has_state && !has_database) return state_file_.Write(*state);
  // What is missing or damaged is a store that was not closed.
  state->phase = Phase::kOpen;
  if (!has_state) return absl::OkStatus();
  absl::StatusOr<std::optional<State>> read = state_file_.Read();
  if (!read.ok()) return read.status();
  if (read->has_value()) *state = **std::move(read);
  return absl::OkStatus();
}

absl::StatusOr<Counts> RocksdbTier::ReadCounts() const {
  std::string value;
  Counts counts;
  const rocksdb::Status status = database_->Get({}, kCountsKey, &value);
  if (status.IsNotFound()) return counts;
  if (!status.ok()) return OpenError(status);
  ByteReader reader(Unseal(value));
  counts.opens = reader.Number<uint64_t>();
  counts.crashes = reader.Number<uint64_t>();
  if (!reader.Finished()) return StoreDamaged("its counts are damaged");
  return counts;
}

absl::Status RocksdbTier::WriteCounts(const Counts& counts) {
  ByteWriter writer;
  writer.Number(counts.opens);
  writer.Number(counts.crashes);
  TierBatch batch;
  batch.puts.emplace_back(kCountsKey, writer.Take());
  Seal(&batch.puts.back().second);
  return Commit({&batch, 1}, true);
}

absl::Status RocksdbTier::Commit(absl::Span<const TierBatch> batches, bool is_synced) {
  if (!failure_.ok()) return failure_;
  rocksdb::WriteBatch writes(0, 0, kProtectionBytesPerKey, 0);
  rocksdb::Status status;
  for (const TierBatch& batch : batches) {
    for (const auto& [begin, end] : batch.removed_ranges) {
      if (status.ok()) status = writes.DeleteRange(begin, end);
    }
    for (const auto& [key, value] : batch.puts) {
      if (status.ok()) status = writes.Put(key, value);
    }
  }
  rocksdb::WriteOptions how;
  how.sync = is_synced;
  if (status.ok()) status = database_->Write(how, &writes);
  return status.ok() ? absl::OkStatus() : Fail("write", status.ToString());
}

absl::StatusOr<std::string> RocksdbTier::Read(const std::string& key) const {
  std::string value;
  rocksdb::ReadOptions how;
  how.verify_checksums = true;
  const rocksdb::Status status = database_->Get(how, key, &value);
  if (!status.ok()) return ReadError(status);
  return value;
}

absl::Status RocksdbTier::Scan(
    const std::string& prefix,
    absl::FunctionRef<void(absl::string_view, absl::string_view)> visit) const {
  rocksdb::ReadOptions how;
  how.verify_checksums = true;
  const std::unique_ptr<rocksdb::Iterator> row(database_->NewIterator(how));
  for (row->Seek(prefix); row->Valid() && row->key().starts_with(prefix); row->Next()) {
    visit({row->key().data(), row->key().size()}, {row->value().data(), row->value().size()});
  }
  return row->status().ok() ? absl::OkStatus() : ReadError(row->status());
}

absl::Status RocksdbTier::Compact() {
  if (!failure_.ok()) return failure_;
  // Room that damaged rows hold is given back when their sequence is dropped.
  const absl::Status readable = Scan("", [](absl::string_view, absl::string_view) {});
  if (!readable.ok()) return absl::OkStatus();
  rocksdb::CompactRangeOptions how;
  how.bottommost_level_compaction = rocksdb::BottommostLevelCompaction::kForce;
  how.blob_garbage_collection_policy = rocksdb::BlobGarbageCollectionPolicy::kForce;
  how.blob_garbage_collection_age_cutoff = 1.0;
  const rocksdb::Status status = database_->CompactRange(how, nullptr, nullptr);
  return status.ok() ? absl::OkStatus() : Fail("compact", status.ToString());
}

absl::Status RocksdbTier::Close(const std::string& inventory) {
  if (!failure_.ok()) return failure_;
  // Rows leave the log, where damage to the last of them could not be told from a torn write.
  rocksdb::Status status = database_->Flush({});
  if (status.ok()) status = database_->Close();
  if (!status.ok()) return Fail("close", status.ToString());
  database_.reset();
  return state_file_.Write({.phase = Phase::kClosed, .counts = counts_, .inventory = inventory});
}

}  // namespace

absl::StatusOr<std::unique_ptr<DiskTier>> OpenRocksdbTier(const RocksdbTierOptions& options) {
  rocksdb::Env* const env = options.env != nullptr ? options.env : rocksdb::Env::Default();
  auto tier = std::make_unique<RocksdbTier>(options, env);
  const absl::Status status = tier->Open();
  if (!status.ok()) return status;
  return tier;
}

}  // namespace kvservice
