// A file system in front of a PowerCutFilesystem in which one operation goes wrong.
//
// Operations are named by what they do to which sort of file, and counted per name ("append log",
// 17): background threads change the order in which operations of different files come, but hardly
// which ones there are. Opening, reading, asking, creating, appending, syncing, closing, renaming
// and deleting are operations, of files and of directories.
//
// Thread-safe.

#ifndef KVSERVICE_TESTS_STRESS_FAULT_FILESYSTEM_H_
#define KVSERVICE_TESTS_STRESS_FAULT_FILESYSTEM_H_

#include <rocksdb/file_system.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/stress/power_cut_filesystem.h"

namespace kvservice::testing {

enum class Fault : uint8_t {
  kErrorOnce,      // An input/output error, nothing done.
  kErrorOn,        // The same for this and all later operations.
  kFullOnce,       // No space left, nothing done.
  kFullOn,         // The same for this and all later creations, appends and syncs.
  kHalfThenError,  // Half of the bytes are appended, then an error.
  kDoneThenError,  // Done, but reported as an error.
  kErrorThenCut,   // An error, nothing done; the power goes when the process ends.
  kCutBefore,      // The power goes, nothing done.
  kCutDuring,      // The power goes; a sync has happened in part.
  kShortRead,      // Half of the bytes are read, without an error.
  kFlippedRead,    // One bit of what is read is another.
};
inline constexpr std::array<Fault, 11> kFaults = {
    Fault::kErrorOnce,     Fault::kErrorOn,       Fault::kFullOnce,     Fault::kFullOn,
    Fault::kHalfThenError, Fault::kDoneThenError, Fault::kErrorThenCut, Fault::kCutBefore,
    Fault::kCutDuring,     Fault::kShortRead,     Fault::kFlippedRead};
const char* FaultName(Fault fault);
// Whether it could happen to operations of this name.
bool Applies(Fault fault, const std::string& operation);
// What a wrong read shows may be taken for damage of the disk.
inline bool IsWrongRead(Fault fault) {
  return fault == Fault::kShortRead || fault == Fault::kFlippedRead;
}

class FaultFilesystem : public rocksdb::FileSystemWrapper {
 public:
  // `hides`: appends and syncs that fail say that they did not: a campaign must notice.
  FaultFilesystem(std::shared_ptr<PowerCutFilesystem> disk, bool hides)
      : rocksdb::FileSystemWrapper(disk), disk_(std::move(disk)), hides_(hides) {}

  // The `nth` operation of the name from now, counted from 1, goes wrong.
  void Arm(const std::string& operation, uint64_t nth, Fault fault);
  // All goes well again; operations are counted on.
  void Clear();
  bool fired() const;
  // By name, since the last Arm, or ever.
  std::map<std::string, uint64_t> counts() const;

  const char* Name() const override { return "FaultFilesystem"; }
  rocksdb::IOStatus NewSequentialFile(const std::string& path, const rocksdb::FileOptions& options,
                                      std::unique_ptr<rocksdb::FSSequentialFile>* file,
                                      rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewRandomAccessFile(const std::string& path,
                                        const rocksdb::FileOptions& options,
                                        std::unique_ptr<rocksdb::FSRandomAccessFile>* file,
                                        rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewDirectory(const std::string& path, const rocksdb::IOOptions& options,
                                 std::unique_ptr<rocksdb::FSDirectory>* directory,
                                 rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus FileExists(const std::string& path, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetChildren(const std::string& path, const rocksdb::IOOptions& options,
                                std::vector<std::string>* names,
                                rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus DeleteFile(const std::string& path, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus CreateDirIfMissing(const std::string& path, const rocksdb::IOOptions& options,
                                       rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetFileSize(const std::string& path, const rocksdb::IOOptions& options,
                                uint64_t* bytes, rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus RenameFile(const std::string& from, const std::string& to,
                               const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus LockFile(const std::string& path, const rocksdb::IOOptions& options,
                             rocksdb::FileLock** lock, rocksdb::IODebugContext* debug) override;

 private:
  friend class FaultyWritableFile;
  friend class FaultySequentialFile;
  friend class FaultyRandomAccessFile;
  friend class FaultyDirectory;

  // What becomes of one operation.
  struct Fate {
    bool runs = true;
    bool is_halved = false;
    bool is_flipped = false;
    // Said instead of what the operation said, if not OK.
    rocksdb::IOStatus says;
  };
  Fate Decide(const char* verb, const std::string& path);
  Fate FateOf(Fault fault);
  template <typename Run>
  rocksdb::IOStatus Do(const char* verb, const std::string& path, const Run& run) {
    const Fate fate = Decide(verb, path);
    const rocksdb::IOStatus said = fate.runs ? run() : rocksdb::IOStatus::OK();
    return fate.says.ok() ? said : fate.says;
  }
  static void Distort(const Fate& fate, rocksdb::Slice* read, char* scratch);

  const std::shared_ptr<PowerCutFilesystem> disk_;
  const bool hides_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::string, uint64_t> counts_;
  std::string armed_;
  uint64_t armed_nth_ = 0;
  Fault fault_ = Fault::kErrorOnce;
  bool fired_ = false;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_FAULT_FILESYSTEM_H_
