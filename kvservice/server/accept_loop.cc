#include "kvservice/server/accept_loop.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace kvservice {
namespace {

// A full table is searched for closed connections at most this often: under a flood the search
// would be the attack.
constexpr uint64_t kSweepIntervalNs = 50'000'000;
// Out of descriptors and unable to shed: leave the waiting connections alone for so long.
constexpr int kPauseMs = 50;
// Connections taken from one listener before the others get their turn.
constexpr int kAcceptsPerTurn = 64;

FileDescriptor OpenReserve() { return FileDescriptor(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

// Closing with a zero linger resets a TCP connection, which frees all of its state at once.
void Reset(FileDescriptor connection) {
  const linger zero{.l_onoff = 1, .l_linger = 0};
  setsockopt(connection.get(), SOL_SOCKET, SO_LINGER, &zero, sizeof(zero));
}

}  // namespace

bool ConnectionTable::IsOpen(const Entry& entry) const {
  struct stat state {};
  return fstat(entry.fd, &state) == 0 && state.st_dev == entry.device &&
         state.st_ino == entry.inode;
}

bool ConnectionTable::HasRoom(uint64_t now_ns) {
  if (entries_.size() < connections_max_) return true;
  if (now_ns < next_sweep_ns_) return false;
  next_sweep_ns_ = now_ns + kSweepIntervalNs;
  std::erase_if(entries_, [this](const Entry& entry) { return !IsOpen(entry); });
  return entries_.size() < connections_max_;
}

void ConnectionTable::Add(int fd) {
  struct stat state {};
  if (fstat(fd, &state) == 0) entries_.push_back({fd, state.st_dev, state.st_ino});
}

AcceptLoop::AcceptLoop(std::vector<std::unique_ptr<Listener>> listeners, size_t connections_max,
                       Clock* clock, Deliver deliver)
    : clock_(clock),
      deliver_(std::move(deliver)),
      listeners_(std::move(listeners)),
      table_(connections_max),
      reserve_(OpenReserve()),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      thread_([this] { Run(); }) {}

AcceptLoop::~AcceptLoop() { Stop(); }

void AcceptLoop::Stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  const uint64_t one = 1;
  // An eventfd refuses a write only when its counter is full, and then it is readable anyway.
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  thread_.join();
  listeners_.clear();
}

void AcceptLoop::Run() {
  std::vector<pollfd> waits(1 + listeners_.size());
  while (!stopping_) {
    waits[0] = {.fd = wake_.get(), .events = POLLIN, .revents = 0};
    for (size_t i = 0; i < listeners_.size(); ++i) {
      // A negative descriptor is skipped by poll.
      const int fd = out_of_descriptors_ ? -1 : listeners_[i]->poll_fd();
      waits[i + 1] = {.fd = fd, .events = POLLIN, .revents = 0};
    }
    const int timeout_ms = out_of_descriptors_ ? kPauseMs : -1;
    poll(waits.data(), waits.size(), timeout_ms);
    out_of_descriptors_ = false;
    for (size_t i = 0; i < listeners_.size() && !stopping_; ++i) {
      if (waits[i + 1].revents != 0) AcceptAll(i);
    }
  }
}

void AcceptLoop::AcceptAll(size_t listener) {
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    absl::StatusOr<FileDescriptor> connection = listeners_[listener]->Accept();
    if (connection.ok()) {
      AcceptOne(listener, *std::move(connection));
      continue;
    }
    const bool exhausted = connection.status().code() == absl::StatusCode::kResourceExhausted;
    if (exhausted && ShedForDescriptors(listener)) continue;
    out_of_descriptors_ = out_of_descriptors_ || exhausted;
    return;
  }
}

void AcceptLoop::AcceptOne(size_t listener, FileDescriptor connection) {
  if (!table_.HasRoom(clock_->SteadyNowNs())) {
    ++shed_count_;
    Reset(std::move(connection));
    return;
  }
  ++accepted_count_;
  table_.Add(connection.get());
  deliver_(listener, std::move(connection));
}

bool AcceptLoop::ShedForDescriptors(size_t listener) {
  reserve_ = FileDescriptor();
  absl::StatusOr<FileDescriptor> connection = listeners_[listener]->Accept();
  const bool shed = connection.ok();
  if (shed) {
    ++shed_count_;
    Reset(*std::move(connection));
  }
  reserve_ = OpenReserve();
  return shed;
}

}  // namespace kvservice
