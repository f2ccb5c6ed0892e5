#include "wire/lane_socket.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <cstring>
#include <utility>

#include "wire/lane_layout.h"

namespace kvservice::wire {
namespace {

// Descriptors that a message may bring before the system drops the rest: one more than is wanted,
// so that two are told from one.
constexpr size_t kDescriptorsMax = 2;

struct alignas(cmsghdr) Control {
  std::array<char, CMSG_SPACE(kDescriptorsMax * sizeof(int))> bytes{};
};

// Takes over every descriptor of the message; returns the only one.
FileDescriptor OnlyDescriptor(msghdr* message) {
  FileDescriptor only;
  size_t count = 0;
  for (cmsghdr* part = CMSG_FIRSTHDR(message); part != nullptr; part = CMSG_NXTHDR(message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t here = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < here; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
      only = FileDescriptor(fd);
      ++count;
    }
  }
  return count == 1 ? std::move(only) : FileDescriptor();
}

}  // namespace

bool SendMessage(int socket, std::string_view bytes, int fd) {
  iovec data{.iov_base = const_cast<char*>(bytes.data()), .iov_len = bytes.size()};
  Control control;
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control.bytes.data();
    message.msg_controllen = CMSG_SPACE(sizeof(int));
    cmsghdr* const part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(part), &fd, sizeof(fd));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

Received ReceiveMessage(int socket) {
  Received received;
  received.bytes.resize(kLaneMessageBytesMax);
  iovec data{.iov_base = received.bytes.data(), .iov_len = received.bytes.size()};
  Control control;
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes.data();
  message.msg_controllen = control.bytes.size();
  received.count = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  received.bytes.resize(received.count > 0 ? static_cast<size_t>(received.count) : 0);
  if (received.count >= 0) received.fd = OnlyDescriptor(&message);
  return received;
}

}  // namespace kvservice::wire
