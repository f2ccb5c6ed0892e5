#include "kvservice/server/transport.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace kvservice {
namespace {

constexpr int kBacklog = 128;

// A bound or dialled address in the form the system calls want.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t bytes = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

SocketAddress AddressOf(const Endpoint& endpoint) {
  SocketAddress address;
  if (endpoint.kind == Endpoint::Kind::kUnix) {
    auto* local = reinterpret_cast<sockaddr_un*>(&address.storage);
    local->sun_family = AF_UNIX;
    std::memcpy(local->sun_path, endpoint.path.c_str(), endpoint.path.size() + 1);
    address.bytes = sizeof(sockaddr_un);
    return address;
  }
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
  if (inet_pton(AF_INET, endpoint.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(endpoint.port);
    address.bytes = sizeof(sockaddr_in);
    return address;
  }
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = htons(endpoint.port);
  inet_pton(AF_INET6, endpoint.host.c_str(), &v6->sin6_addr);
  address.bytes = sizeof(sockaddr_in6);
  return address;
}

absl::Status SystemError(const Endpoint& endpoint, const char* action, int error) {
  const std::string message =
      "cannot " + std::string(action) + " " + endpoint.ToString() + ": " + std::strerror(error);
  switch (error) {
    case EADDRINUSE:
      return absl::AlreadyExistsError(message);
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    default:
      return absl::UnavailableError(message);
  }
}

class SocketListener final : public Listener {
 public:
  SocketListener(FileDescriptor socket, Endpoint endpoint)
      : socket_(std::move(socket)), endpoint_(std::move(endpoint)) {}
  ~SocketListener() override {
    if (endpoint_.kind == Endpoint::Kind::kUnix) unlink(endpoint_.path.c_str());
  }

  const Endpoint& endpoint() const override { return endpoint_; }
  int poll_fd() const override { return socket_.get(); }

  absl::StatusOr<FileDescriptor> Accept() override {
    FileDescriptor connection(
        accept4(socket_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (connection.get() < 0) {
      const int error = errno;
      const bool exhausted =
          error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
      if (exhausted) return absl::ResourceExhaustedError(std::strerror(error));
      return absl::UnavailableError(std::strerror(error));
    }
    if (endpoint_.kind == Endpoint::Kind::kTcp) {
      const int on = 1;
      setsockopt(connection.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    }
    return connection;
  }

 private:
  const FileDescriptor socket_;
  const Endpoint endpoint_;
};

FileDescriptor OpenSocket(const SocketAddress& address) {
  return FileDescriptor(
      socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

// True when a socket file is left over from a process that is gone.
bool IsStale(const Endpoint& endpoint) {
  struct stat entry {};
  if (lstat(endpoint.path.c_str(), &entry) != 0 || !S_ISSOCK(entry.st_mode)) return false;
  const SocketAddress address = AddressOf(endpoint);
  const FileDescriptor probe = OpenSocket(address);
  return probe.get() >= 0 && connect(probe.get(), address.get(), address.bytes) != 0 &&
         errno == ECONNREFUSED;
}

// IPv4 and IPv6 addresses have their port in the same place.
uint16_t BoundPort(int socket) {
  SocketAddress address;
  address.bytes = sizeof(address.storage);
  if (getsockname(socket, address.get(), &address.bytes) != 0) return 0;
  return ntohs(reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_port);
}

class SocketTransport final : public Transport {
 public:
  absl::StatusOr<std::unique_ptr<Listener>> Listen(const Endpoint& endpoint) override {
    const SocketAddress address = AddressOf(endpoint);
    FileDescriptor socket = OpenSocket(address);
    if (socket.get() < 0) return SystemError(endpoint, "open a socket for", errno);
    if (endpoint.kind == Endpoint::Kind::kUnix) {
      // The mode of the descriptor becomes the mode of the file, but for what the umask takes away,
      // so there is no moment at which others than those could connect.
      if (fchmod(socket.get(), endpoint.socket_mode) != 0)
        return SystemError(endpoint, "protect", errno);
      if (IsStale(endpoint)) unlink(endpoint.path.c_str());
    } else {
      const int on = 1;
      setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    }
    if (bind(socket.get(), address.get(), address.bytes) != 0) {
      return SystemError(endpoint, "bind", errno);
    }
    // What the umask has taken away is given back.
    if (endpoint.kind == Endpoint::Kind::kUnix &&
        chmod(endpoint.path.c_str(), endpoint.socket_mode) != 0) {
      return SystemError(endpoint, "protect", errno);
    }
    Endpoint bound = endpoint;
    if (endpoint.kind == Endpoint::Kind::kTcp) bound.port = BoundPort(socket.get());
    auto listener = std::make_unique<SocketListener>(std::move(socket), bound);
    if (listen(listener->poll_fd(), kBacklog) != 0)
      return SystemError(endpoint, "listen on", errno);
    return listener;
  }
};

}  // namespace

Transport* SystemTransport() {
  static SocketTransport transport;
  return &transport;
}

}  // namespace kvservice
