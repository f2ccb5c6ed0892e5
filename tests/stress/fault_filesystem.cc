#include "tests/stress/fault_filesystem.h"

#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace kvservice::testing {
namespace {

using rocksdb::FileOptions;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

// The sort of file, without the numbers in its name.
std::string SortOf(const std::string& path) {
  const std::string name = path.substr(path.rfind('/') + 1);
  for (const char* ending : {".log", ".sst", ".blob", ".dbtmp", ".partial"}) {
    if (absl::EndsWith(name, ending)) return ending + 1;
  }
  for (const char* beginning : {"MANIFEST", "OPTIONS", "CURRENT", "STATE", "IDENTITY", "LOCK"}) {
    if (absl::StartsWith(name, beginning)) return beginning;
  }
  return "directory";
}

bool Begins(const std::string& operation, std::initializer_list<const char*> verbs) {
  for (const char* verb : verbs) {
    if (absl::StartsWith(operation, absl::StrCat(verb, " "))) return true;
  }
  return false;
}

bool Changes(const std::string& operation) {
  return Begins(operation, {"create", "append", "cut", "sync", "close", "rename", "delete"});
}
bool TakesSpace(const std::string& operation) {
  return Begins(operation, {"create", "append", "sync", "close"});
}

IOStatus Broken() { return IOStatus::IOError("this operation fails"); }

}  // namespace

const char* FaultName(Fault fault) {
  switch (fault) {
    case Fault::kErrorOnce:
      return "an error once";
    case Fault::kErrorOn:
      return "errors from here on";
    case Fault::kFullOnce:
      return "no space once";
    case Fault::kFullOn:
      return "no space from here on";
    case Fault::kHalfThenError:
      return "half done and an error";
    case Fault::kDoneThenError:
      return "done and an error";
    case Fault::kErrorThenCut:
      return "an error and then a cut";
    case Fault::kCutBefore:
      return "a cut before";
    case Fault::kCutDuring:
      return "a cut during";
    case Fault::kShortRead:
      return "a short read";
    case Fault::kFlippedRead:
      return "a flipped bit";
  }
  return "";
}

bool Applies(Fault fault, const std::string& operation) {
  switch (fault) {
    case Fault::kErrorOnce:
    case Fault::kErrorOn:
    case Fault::kErrorThenCut:
    case Fault::kCutBefore:
      return true;
    case Fault::kFullOnce:
    case Fault::kFullOn:
      return TakesSpace(operation);
    case Fault::kHalfThenError:
      return Begins(operation, {"append"});
    case Fault::kDoneThenError:
    case Fault::kCutDuring:
      return Changes(operation);
    case Fault::kShortRead:
      // A log that ends early is what a torn write leaves: nobody can tell.
      return Begins(operation, {"read"}) && operation != "read log";
    case Fault::kFlippedRead:
      return Begins(operation, {"read"});
  }
  return false;
}

// ---- Files ----

class FaultyWritableFile : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  FaultyWritableFile(FaultFilesystem* filesystem, std::string path,
                     std::unique_ptr<rocksdb::FSWritableFile> file)
      : FSWritableFileOwnerWrapper(std::move(file)),
        filesystem_(filesystem),
        path_(std::move(path)) {}

  IOStatus Append(const Slice& bytes, const IOOptions& options, IODebugContext* debug) override {
    const FaultFilesystem::Fate fate = filesystem_->Decide("append", path_);
    const Slice written(bytes.data(), fate.is_halved ? bytes.size() / 2 : bytes.size());
    const IOStatus said = fate.runs ? target()->Append(written, options, debug) : IOStatus::OK();
    return fate.says.ok() ? said : fate.says;
  }
  IOStatus Append(const Slice& bytes, const IOOptions& options,
                  const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
    return Append(bytes, options, debug);
  }
  IOStatus Truncate(uint64_t bytes, const IOOptions& options, IODebugContext* debug) override {
    return filesystem_->Do("cut", path_, [&] { return target()->Truncate(bytes, options, debug); });
  }
  IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
    return filesystem_->Do("sync", path_, [&] { return target()->Sync(options, debug); });
  }
  IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
    return Sync(options, debug);
  }
  IOStatus Close(const IOOptions& options, IODebugContext* debug) override {
    return filesystem_->Do("close", path_, [&] { return target()->Close(options, debug); });
  }

 private:
  FaultFilesystem* const filesystem_;
  const std::string path_;
};

class FaultySequentialFile : public rocksdb::FSSequentialFileOwnerWrapper {
 public:
  FaultySequentialFile(FaultFilesystem* filesystem, std::string path,
                       std::unique_ptr<rocksdb::FSSequentialFile> file)
      : FSSequentialFileOwnerWrapper(std::move(file)),
        filesystem_(filesystem),
        path_(std::move(path)) {}
  IOStatus Read(size_t count, const IOOptions& options, Slice* read, char* scratch,
                IODebugContext* debug) override {
    const FaultFilesystem::Fate fate = filesystem_->Decide("read", path_);
    *read = Slice();
    if (!fate.runs) return fate.says;
    const IOStatus said = target()->Read(count, options, read, scratch, debug);
    FaultFilesystem::Distort(fate, read, scratch);
    return said;
  }

 private:
  FaultFilesystem* const filesystem_;
  const std::string path_;
};

class FaultyRandomAccessFile : public rocksdb::FSRandomAccessFileOwnerWrapper {
 public:
  FaultyRandomAccessFile(FaultFilesystem* filesystem, std::string path,
                         std::unique_ptr<rocksdb::FSRandomAccessFile> file)
      : FSRandomAccessFileOwnerWrapper(std::move(file)),
        filesystem_(filesystem),
        path_(std::move(path)) {}
  IOStatus Read(uint64_t offset, size_t count, const IOOptions& options, Slice* read, char* scratch,
                IODebugContext* debug) const override {
    const FaultFilesystem::Fate fate = filesystem_->Decide("read", path_);
    *read = Slice();
    if (!fate.runs) return fate.says;
    const IOStatus said = target()->Read(offset, count, options, read, scratch, debug);
    FaultFilesystem::Distort(fate, read, scratch);
    return said;
  }
  // One operation each.
  IOStatus MultiRead(rocksdb::FSReadRequest* requests, size_t request_count,
                     const IOOptions& options, IODebugContext* debug) override {
    for (size_t i = 0; i < request_count; ++i) {
      requests[i].status = Read(requests[i].offset, requests[i].len, options, &requests[i].result,
                                requests[i].scratch, debug);
    }
    return IOStatus::OK();
  }

 private:
  FaultFilesystem* const filesystem_;
  const std::string path_;
};

class FaultyDirectory : public rocksdb::FSDirectoryWrapper {
 public:
  FaultyDirectory(FaultFilesystem* filesystem, std::string path,
                  std::unique_ptr<rocksdb::FSDirectory> directory)
      : FSDirectoryWrapper(directory.get()),
        filesystem_(filesystem),
        path_(std::move(path)),
        directory_(std::move(directory)) {}
  IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
    return filesystem_->Do("sync", path_, [&] { return directory_->Fsync(options, debug); });
  }
  IOStatus FsyncWithDirOptions(const IOOptions& options, IODebugContext* debug,
                               const rocksdb::DirFsyncOptions&) override {
    return Fsync(options, debug);
  }

 private:
  FaultFilesystem* const filesystem_;
  const std::string path_;
  const std::unique_ptr<rocksdb::FSDirectory> directory_;
};

// ---- The fault ----

void FaultFilesystem::Arm(const std::string& operation, uint64_t nth, Fault fault) {
  const std::lock_guard<std::mutex> lock(mutex_);
  counts_.clear();
  armed_ = operation;
  armed_nth_ = nth;
  fault_ = fault;
  fired_ = false;
}

void FaultFilesystem::Clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  armed_.clear();
}

bool FaultFilesystem::fired() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return fired_;
}

std::map<std::string, uint64_t> FaultFilesystem::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

FaultFilesystem::Fate FaultFilesystem::Decide(const char* verb, const std::string& path) {
  const std::string operation = absl::StrCat(verb, " ", SortOf(path));
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t nth = ++counts_[operation];
  if (armed_.empty()) return {};
  const bool is_first = !fired_ && operation == armed_ && nth == armed_nth_;
  const bool goes_on =
      fired_ && (fault_ == Fault::kErrorOn || (fault_ == Fault::kFullOn && TakesSpace(operation)));
  if (!is_first && !goes_on) return {};
  fired_ = true;
  Fate fate = FateOf(fault_);
  if (hides_ && Begins(operation, {"append", "sync"})) fate.says = IOStatus::OK();
  return fate;
}

FaultFilesystem::Fate FaultFilesystem::FateOf(Fault fault) {
  Fate fate;
  switch (fault) {
    case Fault::kErrorOnce:
    case Fault::kErrorOn:
    case Fault::kErrorThenCut:
      fate = {.runs = false, .says = Broken()};
      break;
    case Fault::kFullOnce:
    case Fault::kFullOn:
      fate = {.runs = false, .says = IOStatus::NoSpace("no space is left")};
      break;
    case Fault::kHalfThenError:
      fate = {.is_halved = true, .says = Broken()};
      break;
    case Fault::kDoneThenError:
      fate = {.says = Broken()};
      break;
    case Fault::kCutBefore:
      disk_->CutAfter(0);
      return {};
    case Fault::kCutDuring:
      disk_->CutAfter(1);
      return {};
    case Fault::kShortRead:
      return {.is_halved = true, .says = IOStatus::OK()};
    case Fault::kFlippedRead:
      return {.is_flipped = true, .says = IOStatus::OK()};
  }
  return fate;
}

void FaultFilesystem::Distort(const Fate& fate, Slice* read, char* scratch) {
  if (fate.is_halved) *read = Slice(read->data(), read->size() / 2);
  if (!fate.is_flipped || read->empty()) return;
  std::memmove(scratch, read->data(), read->size());
  scratch[read->size() / 2] ^= 0x10;
  *read = Slice(scratch, read->size());
}

// ---- The file system ----

IOStatus FaultFilesystem::NewSequentialFile(const std::string& path, const FileOptions& options,
                                            std::unique_ptr<rocksdb::FSSequentialFile>* file,
                                            IODebugContext* debug) {
  return Do("open", path, [&] {
    std::unique_ptr<rocksdb::FSSequentialFile> inner;
    const IOStatus said = target()->NewSequentialFile(path, options, &inner, debug);
    if (said.ok()) *file = std::make_unique<FaultySequentialFile>(this, path, std::move(inner));
    return said;
  });
}

IOStatus FaultFilesystem::NewRandomAccessFile(const std::string& path, const FileOptions& options,
                                              std::unique_ptr<rocksdb::FSRandomAccessFile>* file,
                                              IODebugContext* debug) {
  return Do("open", path, [&] {
    std::unique_ptr<rocksdb::FSRandomAccessFile> inner;
    const IOStatus said = target()->NewRandomAccessFile(path, options, &inner, debug);
    if (said.ok()) *file = std::make_unique<FaultyRandomAccessFile>(this, path, std::move(inner));
    return said;
  });
}

IOStatus FaultFilesystem::NewWritableFile(const std::string& path, const FileOptions& options,
                                          std::unique_ptr<rocksdb::FSWritableFile>* file,
                                          IODebugContext* debug) {
  return Do("create", path, [&] {
    std::unique_ptr<rocksdb::FSWritableFile> inner;
    const IOStatus said = target()->NewWritableFile(path, options, &inner, debug);
    if (said.ok()) *file = std::make_unique<FaultyWritableFile>(this, path, std::move(inner));
    return said;
  });
}

IOStatus FaultFilesystem::NewDirectory(const std::string& path, const IOOptions& options,
                                       std::unique_ptr<rocksdb::FSDirectory>* directory,
                                       IODebugContext* debug) {
  return Do("open", path, [&] {
    std::unique_ptr<rocksdb::FSDirectory> inner;
    const IOStatus said = target()->NewDirectory(path, options, &inner, debug);
    if (said.ok()) *directory = std::make_unique<FaultyDirectory>(this, path, std::move(inner));
    return said;
  });
}

IOStatus FaultFilesystem::FileExists(const std::string& path, const IOOptions& options,
                                     IODebugContext* debug) {
  return Do("find", path, [&] { return target()->FileExists(path, options, debug); });
}

IOStatus FaultFilesystem::GetChildren(const std::string& path, const IOOptions& options,
                                      std::vector<std::string>* names, IODebugContext* debug) {
  return Do("list", path, [&] { return target()->GetChildren(path, options, names, debug); });
}

IOStatus FaultFilesystem::DeleteFile(const std::string& path, const IOOptions& options,
                                     IODebugContext* debug) {
  return Do("delete", path, [&] { return target()->DeleteFile(path, options, debug); });
}

IOStatus FaultFilesystem::CreateDirIfMissing(const std::string& path, const IOOptions& options,
                                             IODebugContext* debug) {
  return Do("create", path, [&] { return target()->CreateDirIfMissing(path, options, debug); });
}

IOStatus FaultFilesystem::GetFileSize(const std::string& path, const IOOptions& options,
                                      uint64_t* bytes, IODebugContext* debug) {
  return Do("measure", path, [&] { return target()->GetFileSize(path, options, bytes, debug); });
}

IOStatus FaultFilesystem::RenameFile(const std::string& from, const std::string& to,
                                     const IOOptions& options, IODebugContext* debug) {
  return Do("rename", to, [&] { return target()->RenameFile(from, to, options, debug); });
}

IOStatus FaultFilesystem::LockFile(const std::string& path, const IOOptions& options,
                                   rocksdb::FileLock** lock, IODebugContext* debug) {
  return Do("lock", path, [&] { return target()->LockFile(path, options, lock, debug); });
}

}  // namespace kvservice::testing
