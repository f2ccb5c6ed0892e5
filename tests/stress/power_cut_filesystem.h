// A file system in memory whose power can be cut.
//
// What a disk promises, and nothing more. Bytes of a file survive a cut if they were synced; of
// others any prefix does (file systems that show zeros in the place of bytes that never reached the
// disk, as ext4 does with data=writeback, are not modelled: RocksDB refuses to open a manifest that
// ends like that). Names (creations, renames, removals)
// survive if their directory was synced; of later changes a prefix does, in their order. A sync
// that is under way when the power goes has happened in part. What a cut leaves follows from the
// seed.
//
// After the cut every operation fails until Reboot; programs are then expected to be gone.
// Thread-safe.

#ifndef KVSERVICE_TESTS_STRESS_POWER_CUT_FILESYSTEM_H_
#define KVSERVICE_TESTS_STRESS_POWER_CUT_FILESYSTEM_H_

#include <rocksdb/file_system.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace kvservice::testing {

class PowerCutFilesystem : public rocksdb::FileSystem {
 public:
  // What the power does not survive; named for what keeps it honest (a test that cannot fail proves
  // nothing).
  struct Options {
    uint64_t seed = 1;
    // Syncs of RocksDB's logs answer OK and do nothing: a disk that lies.
    bool ignore_log_syncs = false;
  };
  explicit PowerCutFilesystem(const Options& options);

  // Cuts the power in the `count`-th operation from now that changes something (1 = the next, 0 =
  // now).
  void CutAfter(uint64_t count);
  bool is_off() const;
  // Operations that change something, so far.
  uint64_t operations() const;
  // The power comes back, to what the disk still has.
  void Reboot();

  // For tests that damage a closed store: all files with their bytes, and other ones in their
  // place.
  std::map<std::string, std::string> Files() const;
  void ReplaceAll(const std::map<std::string, std::string>& files);

  const char* Name() const override { return "PowerCutFilesystem"; }
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
  rocksdb::IOStatus CreateDir(const std::string& path, const rocksdb::IOOptions& options,
                              rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus CreateDirIfMissing(const std::string& path, const rocksdb::IOOptions& options,
                                       rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus DeleteDir(const std::string& path, const rocksdb::IOOptions& options,
                              rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetFileSize(const std::string& path, const rocksdb::IOOptions& options,
                                uint64_t* bytes, rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetFileModificationTime(const std::string& path,
                                            const rocksdb::IOOptions& options, uint64_t* time_s,
                                            rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus RenameFile(const std::string& from, const std::string& to,
                               const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus LockFile(const std::string& path, const rocksdb::IOOptions& options,
                             rocksdb::FileLock** lock, rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus UnlockFile(rocksdb::FileLock* lock, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetTestDirectory(const rocksdb::IOOptions& options, std::string* path,
                                     rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus GetAbsolutePath(const std::string& path, const rocksdb::IOOptions& options,
                                    std::string* absolute, rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus IsDirectory(const std::string& path, const rocksdb::IOOptions& options,
                                bool* is_directory, rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewLogger(const std::string& path, const rocksdb::IOOptions& options,
                              std::shared_ptr<rocksdb::Logger>* logger,
                              rocksdb::IODebugContext* debug) override;

 private:
  friend class PowerCutWritableFile;
  friend class PowerCutReadableFile;
  friend class PowerCutDirectory;

  struct File {
    std::string bytes;
    size_t synced_bytes = 0;
    bool is_log = false;
  };
  using Names = std::map<std::string, std::shared_ptr<File>>;
  struct NameChange {
    std::string directory;
    std::function<void(Names* names)> apply;
  };

  // These need mutex_ held.
  // False if the power is off; goes off if this is the operation.
  bool PowerFor(bool* is_last);
  void Change(const std::string& path, std::function<void(Names* names)> apply);
  rocksdb::IOStatus SyncFile(File* file);
  rocksdb::IOStatus SyncDirectory(const std::string& directory);
  uint64_t Below(uint64_t limit);

  const Options options_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::mt19937_64 random_;
  Names names_;
  Names durable_names_;
  // Not durable yet, oldest first.
  std::vector<NameChange> changes_;
  std::set<std::string> directories_;
  std::set<std::string> locks_;
  uint64_t operations_ = 0;
  uint64_t cut_at_ = UINT64_MAX;
  bool is_off_ = false;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_POWER_CUT_FILESYSTEM_H_
