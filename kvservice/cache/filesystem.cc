#include "kvservice/cache/filesystem.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

absl::Status ErrorAt(const char* operation, const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat(operation, " ", path));
}

// Closes on every path out; Close() reports what the destructor could not.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  bool ok() const { return fd_ >= 0; }
  int get() const { return fd_; }
  // Linux frees the descriptor even when close fails, so it is never repeated.
  bool Close() {
    const int fd = fd_;
    fd_ = -1;
    return close(fd) == 0;
  }

 private:
  int fd_;
};

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

bool WriteAll(int fd, const std::string& contents) {
  size_t written = 0;
  while (written < contents.size()) {
    const ssize_t count = write(fd, contents.data() + written, contents.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return false;
    written += static_cast<size_t>(count);
  }
  return true;
}

absl::Status SyncDirectory(const std::string& path) {
  FileDescriptor directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory.ok()) return ErrorAt("open", path);
  if (fsync(directory.get()) != 0) return ErrorAt("fsync", path);
  return absl::OkStatus();
}

class PosixFilesystem : public Filesystem {
 public:
  absl::StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max) override {
    FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!file.ok()) return ErrorAt("open", path);
    std::string contents;
    char buffer[16384];
    while (true) {
      const ssize_t count = read(file.get(), buffer, sizeof(buffer));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return ErrorAt("read", path);
      if (count == 0) return contents;
      if (static_cast<size_t>(count) > bytes_max - contents.size()) {
        return absl::ResourceExhaustedError(
            absl::StrCat("read ", path, ": more than ", bytes_max, " bytes"));
      }
      contents.append(buffer, static_cast<size_t>(count));
    }
  }

  absl::Status WriteFile(const std::string& path, const std::string& contents) override {
    std::string temporary = path + ".XXXXXX";
    FileDescriptor file(mkostemp(temporary.data(), O_CLOEXEC));
    if (!file.ok()) return ErrorAt("create", temporary);
    absl::Status status;
    if (!WriteAll(file.get(), contents)) status = ErrorAt("write", temporary);
    if (status.ok() && fsync(file.get()) != 0) status = ErrorAt("fsync", temporary);
    if (!file.Close() && status.ok()) status = ErrorAt("close", temporary);
    if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) {
      status = ErrorAt("rename", path);
    }
    if (!status.ok()) {
      unlink(temporary.c_str());
      return status;
    }
    return SyncDirectory(DirectoryOf(path));
  }

  absl::Status RemoveFile(const std::string& path) override {
    return unlink(path.c_str()) == 0 ? absl::OkStatus() : ErrorAt("remove", path);
  }

  absl::Status CreateDirectory(const std::string& path) override {
    if (mkdir(path.c_str(), 0700) == 0) return absl::OkStatus();
    const int error = errno;
    struct stat existing;
    if (error == EEXIST && stat(path.c_str(), &existing) == 0 && S_ISDIR(existing.st_mode)) {
      return absl::OkStatus();
    }
    return absl::ErrnoToStatus(error, absl::StrCat("create directory ", path));
  }
};

}  // namespace

Filesystem* SystemFilesystem() {
  static PosixFilesystem filesystem;
  return &filesystem;
}

}  // namespace kvservice
