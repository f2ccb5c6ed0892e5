// Messages with descriptors on a Unix socket, as a lane is opened with them. Any thread.

#ifndef KVSERVICE_WIRE_LANE_SOCKET_H_
#define KVSERVICE_WIRE_LANE_SOCKET_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "wire/file_descriptor.h"

namespace kvservice::wire {

// Sends the bytes, at most kLaneMessageBytesMax, as one message with the descriptor, if there is
// one (-1 = none). False, with errno set, when they did not all go at once.
bool SendMessage(int socket, std::string_view bytes, int fd);

struct Received {
  // What recvmsg returned: -1 with errno set, 0 at the end of the connection.
  ssize_t count = -1;
  std::string bytes;
  // The descriptor that came along; empty when there was none or more than one.
  FileDescriptor fd;
};
// Takes one message of at most kLaneMessageBytesMax bytes.
Received ReceiveMessage(int socket);

}  // namespace kvservice::wire

#endif  // KVSERVICE_WIRE_LANE_SOCKET_H_
