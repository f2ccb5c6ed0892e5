#include "tests/server/cut_proxy.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace kvservice::testing {
namespace {

constexpr int kForever = -1;

// Blocks until one of the two is readable.
void WaitReadable(std::array<pollfd, 2>* waits) {
  for (pollfd& wait : *waits) wait.revents = 0;
  poll(waits->data(), waits->size(), kForever);
}

// Moves what is there, at most `bytes_max`; the number of bytes, 0 when the source has ended.
size_t Forward(int from, int to, size_t bytes_max) {
  std::array<char, 16384> buffer;
  const ssize_t got = recv(from, buffer.data(), std::min(buffer.size(), bytes_max), 0);
  if (got <= 0) return 0;
  size_t sent = 0;
  while (sent < static_cast<size_t>(got)) {
    const ssize_t put =
        send(to, buffer.data() + sent, static_cast<size_t>(got) - sent, MSG_NOSIGNAL);
    if (put <= 0) return 0;
    sent += static_cast<size_t>(put);
  }
  return sent;
}

}  // namespace

FileDescriptor ConnectSocket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  FileDescriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0)
      << path;
  return socket;
}

CutProxy::CutProxy(const std::string& path, const std::string& target_path, size_t client_bytes_max)
    : client_bytes_max_(client_bytes_max) {
  Endpoint endpoint;
  endpoint.path = path;
  absl::StatusOr<std::unique_ptr<Listener>> listener = SystemTransport()->Listen(endpoint);
  EXPECT_TRUE(listener.ok()) << listener.status();
  listener_ = *std::move(listener);
  thread_ = std::thread([this, target_path] { Run(target_path); });
}

CutProxy::~CutProxy() { thread_.join(); }

void CutProxy::Run(const std::string& target_path) {
  pollfd wait{.fd = listener_->poll_fd(), .events = POLLIN, .revents = 0};
  poll(&wait, 1, kForever);
  absl::StatusOr<FileDescriptor> client = listener_->Accept();
  listener_.reset();
  if (!client.ok()) return;
  const FileDescriptor server = ConnectSocket(target_path);
  std::array<pollfd, 2> waits = {{{.fd = client->get(), .events = POLLIN, .revents = 0},
                                  {.fd = server.get(), .events = POLLIN, .revents = 0}}};
  size_t left = client_bytes_max_;
  while (left > 0) {
    WaitReadable(&waits);
    if (waits[0].revents != 0) {
      const size_t moved = Forward(client->get(), server.get(), left);
      if (moved == 0) return;
      left -= moved;
    }
    if (waits[1].revents != 0 && Forward(server.get(), client->get(), SIZE_MAX) == 0) return;
  }
}

}  // namespace kvservice::testing
