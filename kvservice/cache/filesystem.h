// The filesystem seam. Everything durable goes through it, so that tests can drop unsynced bytes,
// tear writes and fail any operation. Today it serves configuration and socket directories; the
// disk tier stands on the same interface.

#ifndef KVSERVICE_KVSERVICE_CACHE_FILESYSTEM_H_
#define KVSERVICE_KVSERVICE_CACHE_FILESYSTEM_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvservice {

// Thread-safe. Errors carry the path and errno text.
class Filesystem {
 public:
  virtual ~Filesystem() = default;
  // Whole contents; RESOURCE_EXHAUSTED above `bytes_max`, NOT_FOUND if there is no such file.
  virtual absl::StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max) = 0;
  // Replaces the file atomically (temporary file, sync, rename, sync of the directory).
  virtual absl::Status WriteFile(const std::string& path, const std::string& contents) = 0;
  virtual absl::Status RemoveFile(const std::string& path) = 0;
  // Creates one directory with mode 0700; OK if it exists.
  virtual absl::Status CreateDirectory(const std::string& path) = 0;
};

Filesystem* SystemFilesystem();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_FILESYSTEM_H_
