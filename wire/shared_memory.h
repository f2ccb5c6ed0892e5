// Memory that two processes share, and sleeping on its words. Any thread.

#ifndef KVSERVICE_WIRE_SHARED_MEMORY_H_
#define KVSERVICE_WIRE_SHARED_MEMORY_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/types/span.h"
#include "wire/file_descriptor.h"

namespace kvservice::wire {

// A mapping, undone by the destructor. Move-only.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMemory();

  // The first `bytes` of a memory file, for reading and writing. Empty, with errno set, when the
  // system refuses. The descriptor need not stay open.
  static SharedMemory Map(int fd, size_t bytes);

  absl::Span<std::byte> bytes() const { return bytes_; }

 private:
  absl::Span<std::byte> bytes_;
};

// A memory file of zeros that can neither shrink nor grow, so that whoever maps it need not fear
// the other one. Empty, with errno set, when the system refuses.
FileDescriptor NewSealedMemory(size_t bytes);

// True when the file is such a one: shared memory of the system's page size with all the seals, so
// that no access to it can fault. Anything may be asked.
bool IsSealedMemory(int fd);

// Sleeps while `word` (shared memory) is `value`, for at most `time_max`; may return early.
void SleepWhile(const uint32_t* word, uint32_t value, std::chrono::nanoseconds time_max);
// Wakes everybody who sleeps on `word`, in whatever process.
void Wake(const uint32_t* word);

}  // namespace kvservice::wire

#endif  // KVSERVICE_WIRE_SHARED_MEMORY_H_
