#include "wire/shared_memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace kvservice::wire {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

}  // namespace

SharedMemory::~SharedMemory() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

SharedMemory SharedMemory::Map(int fd, size_t bytes) {
  SharedMemory memory;
  void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (start != MAP_FAILED) memory.bytes_ = {static_cast<std::byte*>(start), bytes};
  return memory;
}

FileDescriptor NewSealedMemory(size_t bytes) {
  FileDescriptor file(memfd_create("kvservice-lane", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const bool made = file.get() >= 0 && ftruncate(file.get(), static_cast<off_t>(bytes)) == 0 &&
                    fcntl(file.get(), F_ADD_SEALS, kSeals) == 0;
  return made ? std::move(file) : FileDescriptor();
}

bool IsSealedMemory(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) return false;
  // Huge pages can be sealed too, and a fault beyond their pool is a signal.
  struct statfs system {};
  return fstatfs(fd, &system) == 0 && system.f_type == TMPFS_MAGIC;
}

void SleepWhile(const uint32_t* word, uint32_t value, std::chrono::nanoseconds time_max) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(time_max);
  const timespec timeout{.tv_sec = seconds.count(), .tv_nsec = (time_max - seconds).count()};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}

void Wake(const uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace kvservice::wire
