#include "kvservice/server/accept_loop.h"

#include <fcntl.h>
#include <netinet/in.h>
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
// Of an IPv6 address: what a host has to itself, and what comes before an IPv4 address in it.
constexpr size_t kHostPrefixBytes = 8;
constexpr size_t kMappedBytes = 12;
// Connections taken from one listener before the others get their turn.
constexpr int kAcceptsPerTurn = 64;

// The bytes of the address that one host is known by; empty where there is none.
std::string HostOf(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof(address);
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return "";
  if (address.ss_family == AF_INET) {
    const in_addr host = reinterpret_cast<const sockaddr_in&>(address).sin_addr;
    return {reinterpret_cast<const char*>(&host), sizeof(host)};
  }
  if (address.ss_family != AF_INET6) return "";
  const in6_addr host = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  const auto* const first = reinterpret_cast<const char*>(&host);
  // An IPv4 address in IPv6 clothes is told by its end.
  return IN6_IS_ADDR_V4MAPPED(&host) ? std::string(first + kMappedBytes, sizeof(in_addr))
                                     : std::string(first, kHostPrefixBytes);
}

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

bool ConnectionTable::MayAdd(const std::string& host) const {
  if (entries_.size() >= limits_.total) return false;
  const auto count = count_of_host_.find(host);
  return host.empty() || count == count_of_host_.end() || count->second < limits_.per_host;
}

bool ConnectionTable::HasRoom(const std::string& host, uint64_t now_ns) {
  if (MayAdd(host)) return true;
  if (now_ns < next_sweep_ns_) return false;
  next_sweep_ns_ = now_ns + kSweepIntervalNs;
  std::erase_if(entries_, [this](const Entry& entry) {
    if (IsOpen(entry)) return false;
    const auto count = count_of_host_.find(entry.host);
    if (--count->second == 0) count_of_host_.erase(count);
    return true;
  });
  return MayAdd(host);
}

void ConnectionTable::Add(int fd, const std::string& host) {
  struct stat state {};
  if (fstat(fd, &state) != 0) return;
  entries_.push_back({.fd = fd, .device = state.st_dev, .inode = state.st_ino, .host = host});
  ++count_of_host_[host];
}

AcceptLoop::AcceptLoop(std::vector<std::unique_ptr<Listener>> listeners,
                       const ConnectionLimits& limits, Clock* clock, Deliver deliver)
    : clock_(clock),
      deliver_(std::move(deliver)),
      listeners_(std::move(listeners)),
      table_(limits),
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
  const std::string host = HostOf(connection.get());
  if (!table_.HasRoom(host, clock_->SteadyNowNs())) {
    ++shed_count_;
    Reset(std::move(connection));
    return;
  }
  ++accepted_count_;
  table_.Add(connection.get(), host);
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
