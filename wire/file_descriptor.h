// Ownership of file descriptors.

#ifndef KVSERVICE_WIRE_FILE_DESCRIPTOR_H_
#define KVSERVICE_WIRE_FILE_DESCRIPTOR_H_

#include <unistd.h>

#include <utility>

namespace kvservice {

// An open file descriptor, closed by the destructor. Move-only.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }

  // -1 when empty.
  int get() const { return fd_; }
  // The caller becomes the owner.
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

}  // namespace kvservice

#endif  // KVSERVICE_WIRE_FILE_DESCRIPTOR_H_
