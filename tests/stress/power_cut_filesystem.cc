#include "tests/stress/power_cut_filesystem.h"

#include <rocksdb/env.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvservice::testing {
namespace {

using rocksdb::FileOptions;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

IOStatus Off() { return IOStatus::IOError("the power is off"); }
IOStatus Missing(const std::string& path) { return IOStatus::PathNotFound("no such file", path); }

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string WithoutSlash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

struct Lock : public rocksdb::FileLock {
  explicit Lock(std::string path_in) : path(std::move(path_in)) {}
  std::string path;
};

class SilentLogger : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
  size_t GetLogFileSize() const override { return 0; }
};

}  // namespace

class PowerCutReadableFile : public rocksdb::FSSequentialFile, public rocksdb::FSRandomAccessFile {
 public:
  PowerCutReadableFile(PowerCutFilesystem* filesystem,
                       std::shared_ptr<PowerCutFilesystem::File> file)
      : filesystem_(filesystem), file_(std::move(file)) {}

  IOStatus Read(size_t count, const IOOptions& options, Slice* result, char* scratch,
                IODebugContext* debug) override {
    const IOStatus status = Read(at_, count, options, result, scratch, debug);
    at_ += result->size();
    return status;
  }
  IOStatus Skip(uint64_t count) override {
    at_ += count;
    return IOStatus::OK();
  }
  IOStatus Read(uint64_t offset, size_t count, const IOOptions&, Slice* result, char* scratch,
                IODebugContext*) const override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    *result = Slice();
    if (filesystem_->is_off_) return Off();
    const std::string& bytes = file_->bytes;
    const uint64_t begin = std::min<uint64_t>(offset, bytes.size());
    const uint64_t taken = std::min<uint64_t>(count, bytes.size() - begin);
    std::memcpy(scratch, bytes.data() + begin, taken);
    *result = Slice(scratch, taken);
    return IOStatus::OK();
  }
  IOStatus InvalidateCache(size_t, size_t) override { return IOStatus::OK(); }

 private:
  PowerCutFilesystem* const filesystem_;
  const std::shared_ptr<PowerCutFilesystem::File> file_;
  uint64_t at_ = 0;
};

class PowerCutWritableFile : public rocksdb::FSWritableFile {
 public:
  PowerCutWritableFile(PowerCutFilesystem* filesystem,
                       std::shared_ptr<PowerCutFilesystem::File> file)
      : filesystem_(filesystem), file_(std::move(file)) {}

  using rocksdb::FSWritableFile::Append;
  IOStatus Append(const Slice& bytes, const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    bool is_last = false;
    if (!filesystem_->PowerFor(&is_last)) return Off();
    file_->bytes.append(bytes.data(), bytes.size());
    return is_last ? Off() : IOStatus::OK();
  }
  IOStatus Truncate(uint64_t bytes, const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    bool is_last = false;
    if (!filesystem_->PowerFor(&is_last)) return Off();
    file_->bytes.resize(bytes);
    file_->synced_bytes = std::min<size_t>(file_->synced_bytes, bytes);
    return is_last ? Off() : IOStatus::OK();
  }
  IOStatus Close(const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    return filesystem_->is_off_ ? Off() : IOStatus::OK();
  }
  IOStatus Flush(const IOOptions&, IODebugContext*) override { return IOStatus::OK(); }
  IOStatus Sync(const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    return filesystem_->SyncFile(file_.get());
  }
  IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
    return Sync(options, debug);
  }
  bool IsSyncThreadSafe() const override { return true; }
  uint64_t GetFileSize(const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    return file_->bytes.size();
  }

 private:
  PowerCutFilesystem* const filesystem_;
  const std::shared_ptr<PowerCutFilesystem::File> file_;
};

class PowerCutDirectory : public rocksdb::FSDirectory {
 public:
  PowerCutDirectory(PowerCutFilesystem* filesystem, std::string path)
      : filesystem_(filesystem), path_(std::move(path)) {}
  IOStatus Fsync(const IOOptions&, IODebugContext*) override {
    const std::lock_guard<std::mutex> lock(filesystem_->mutex_);
    return filesystem_->SyncDirectory(path_);
  }

 private:
  PowerCutFilesystem* const filesystem_;
  const std::string path_;
};

PowerCutFilesystem::PowerCutFilesystem(const Options& options)
    : options_(options), random_(options.seed) {}

// ---- The power ----

void PowerCutFilesystem::CutAfter(uint64_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cut_at_ = operations_ + count;
  is_off_ = is_off_ || count == 0;
}

bool PowerCutFilesystem::is_off() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return is_off_;
}

uint64_t PowerCutFilesystem::operations() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return operations_;
}

uint64_t PowerCutFilesystem::Below(uint64_t limit) { return limit == 0 ? 0 : random_() % limit; }

bool PowerCutFilesystem::PowerFor(bool* is_last) {
  if (is_off_) return false;
  ++operations_;
  is_off_ = *is_last = operations_ >= cut_at_;
  return true;
}

void PowerCutFilesystem::Reboot() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t kept_changes = Below(changes_.size() + 1);
  for (uint64_t i = 0; i < kept_changes; ++i) changes_[i].apply(&durable_names_);
  changes_.clear();
  names_ = durable_names_;
  for (const auto& [path, file] : names_) {
    // The seeds of half of the cuts drop whatever can be dropped.
    const uint64_t unsynced = file->bytes.size() - file->synced_bytes;
    const uint64_t kept = Below(2) == 0 ? 0 : Below(unsynced + 1);
    file->bytes.resize(file->synced_bytes + kept);
    file->synced_bytes = file->bytes.size();
  }
  locks_.clear();
  cut_at_ = UINT64_MAX;
  is_off_ = false;
}

IOStatus PowerCutFilesystem::SyncFile(File* file) {
  bool is_last = false;
  if (!PowerFor(&is_last)) return Off();
  if (options_.ignore_log_syncs && file->is_log) return is_last ? Off() : IOStatus::OK();
  const size_t unsynced = file->bytes.size() - file->synced_bytes;
  file->synced_bytes += is_last ? Below(unsynced + 1) : unsynced;
  return is_last ? Off() : IOStatus::OK();
}

IOStatus PowerCutFilesystem::SyncDirectory(const std::string& directory) {
  bool is_last = false;
  if (!PowerFor(&is_last)) return Off();
  if (is_last) return Off();
  std::vector<NameChange> others;
  for (NameChange& change : changes_) {
    if (change.directory == directory) {
      change.apply(&durable_names_);
    } else {
      others.push_back(std::move(change));
    }
  }
  changes_ = std::move(others);
  return IOStatus::OK();
}

void PowerCutFilesystem::Change(const std::string& path, std::function<void(Names* names)> apply) {
  apply(&names_);
  changes_.push_back({DirectoryOf(path), std::move(apply)});
}

// ---- For tests ----

std::map<std::string, std::string> PowerCutFilesystem::Files() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, std::string> files;
  for (const auto& [path, file] : names_) files[path] = file->bytes;
  return files;
}

void PowerCutFilesystem::ReplaceAll(const std::map<std::string, std::string>& files) {
  const std::lock_guard<std::mutex> lock(mutex_);
  names_.clear();
  changes_.clear();
  for (const auto& [path, bytes] : files) {
    auto file = std::make_shared<File>();
    file->synced_bytes = bytes.size();
    file->bytes = bytes;
    names_[path] = std::move(file);
  }
  durable_names_ = names_;
}

// ---- The file system ----

IOStatus PowerCutFilesystem::NewSequentialFile(const std::string& path, const FileOptions&,
                                               std::unique_ptr<rocksdb::FSSequentialFile>* file,
                                               IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  const auto found = names_.find(path);
  if (found == names_.end()) return Missing(path);
  *file = std::make_unique<PowerCutReadableFile>(this, found->second);
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::NewRandomAccessFile(const std::string& path, const FileOptions&,
                                                 std::unique_ptr<rocksdb::FSRandomAccessFile>* file,
                                                 IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  const auto found = names_.find(path);
  if (found == names_.end()) return Missing(path);
  *file = std::make_unique<PowerCutReadableFile>(this, found->second);
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::NewWritableFile(const std::string& path, const FileOptions&,
                                             std::unique_ptr<rocksdb::FSWritableFile>* file,
                                             IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bool is_last = false;
  if (!PowerFor(&is_last)) return Off();
  auto made = std::make_shared<File>();
  made->is_log = path.ends_with(".log");
  Change(path, [path, made](Names* names) { (*names)[path] = made; });
  if (is_last) return Off();
  *file = std::make_unique<PowerCutWritableFile>(this, std::move(made));
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::NewDirectory(const std::string& path, const IOOptions&,
                                          std::unique_ptr<rocksdb::FSDirectory>* directory,
                                          IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  *directory = std::make_unique<PowerCutDirectory>(this, WithoutSlash(path));
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::FileExists(const std::string& path, const IOOptions&,
                                        IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  const bool exists = names_.contains(path) || directories_.contains(WithoutSlash(path));
  return exists ? IOStatus::OK() : IOStatus::NotFound(path);
}

IOStatus PowerCutFilesystem::GetChildren(const std::string& path, const IOOptions&,
                                         std::vector<std::string>* names, IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  names->clear();
  const std::string directory = WithoutSlash(path);
  if (!directories_.contains(directory)) return IOStatus::NotFound(path);
  for (const auto& [child, file] : names_) {
    if (DirectoryOf(child) == directory) names->push_back(child.substr(directory.size() + 1));
  }
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::DeleteFile(const std::string& path, const IOOptions&,
                                        IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bool is_last = false;
  if (!PowerFor(&is_last)) return Off();
  if (!names_.contains(path)) return Missing(path);
  Change(path, [path](Names* names) { names->erase(path); });
  return is_last ? Off() : IOStatus::OK();
}

// Directories are there for good: a store has one, and its owner makes it.
IOStatus PowerCutFilesystem::CreateDir(const std::string& path, const IOOptions&, IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  directories_.insert(WithoutSlash(path));
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::CreateDirIfMissing(const std::string& path, const IOOptions& options,
                                                IODebugContext* debug) {
  return CreateDir(path, options, debug);
}

IOStatus PowerCutFilesystem::DeleteDir(const std::string&, const IOOptions&, IODebugContext*) {
  return IOStatus::NotSupported("directories stay");
}

IOStatus PowerCutFilesystem::GetFileSize(const std::string& path, const IOOptions&, uint64_t* bytes,
                                         IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_off_) return Off();
  const auto found = names_.find(path);
  if (found == names_.end()) return Missing(path);
  *bytes = found->second->bytes.size();
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::GetFileModificationTime(const std::string&, const IOOptions&,
                                                     uint64_t* time_s, IODebugContext*) {
  *time_s = 0;
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::RenameFile(const std::string& from, const std::string& to,
                                        const IOOptions&, IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bool is_last = false;
  if (!PowerFor(&is_last)) return Off();
  if (!names_.contains(from)) return Missing(from);
  Change(to, [from, to](Names* names) {
    const auto found = names->find(from);
    if (found == names->end()) return;
    (*names)[to] = found->second;
    names->erase(from);
  });
  return is_last ? Off() : IOStatus::OK();
}

IOStatus PowerCutFilesystem::LockFile(const std::string& path, const IOOptions&,
                                      rocksdb::FileLock** lock, IODebugContext*) {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (is_off_) return Off();
  if (!locks_.insert(path).second) return IOStatus::IOError("lock is held", path);
  *lock = new Lock(path);
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::UnlockFile(rocksdb::FileLock* lock, const IOOptions&,
                                        IODebugContext*) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const std::unique_ptr<Lock> held(static_cast<Lock*>(lock));
  locks_.erase(held->path);
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::GetTestDirectory(const IOOptions&, std::string* path,
                                              IODebugContext*) {
  *path = "/test";
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::GetAbsolutePath(const std::string& path, const IOOptions&,
                                             std::string* absolute, IODebugContext*) {
  *absolute = path;
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::IsDirectory(const std::string& path, const IOOptions&,
                                         bool* is_directory, IODebugContext*) {
  const std::lock_guard<std::mutex> lock(mutex_);
  *is_directory = directories_.contains(WithoutSlash(path));
  return IOStatus::OK();
}

IOStatus PowerCutFilesystem::NewLogger(const std::string&, const IOOptions&,
                                       std::shared_ptr<rocksdb::Logger>* logger, IODebugContext*) {
  *logger = std::make_shared<SilentLogger>();
  return IOStatus::OK();
}

}  // namespace kvservice::testing
