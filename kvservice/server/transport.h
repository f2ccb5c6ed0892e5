// The transport seam: where connections come from. The server accepts connections itself and hands
// open sockets to gRPC, because gRPC's own accept loop stops for ever when it once runs out of file
// descriptors. Tests wrap the system's transport to refuse, break and exhaust connections.

#ifndef KVSERVICE_KVSERVICE_SERVER_TRANSPORT_H_
#define KVSERVICE_KVSERVICE_SERVER_TRANSPORT_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kvservice/server/endpoint.h"
#include "wire/file_descriptor.h"

namespace kvservice {

// One bound address. Accept is called from one thread at a time; the destructor stops listening.
class Listener {
 public:
  virtual ~Listener() = default;
  // The address that was bound, with the port that the system chose.
  virtual const Endpoint& endpoint() const = 0;
  // Readable (as poll means it) while a connection waits.
  virtual int poll_fd() const = 0;
  // Takes one waiting connection without blocking: a non-blocking, close-on-exec stream socket.
  // UNAVAILABLE when none waits or the one that did is gone; RESOURCE_EXHAUSTED when the process or
  // the host is out of descriptors or memory.
  virtual absl::StatusOr<FileDescriptor> Accept() = 0;
};

// Thread-safe.
class Transport {
 public:
  virtual ~Transport() = default;
  // Binds and listens. A Unix socket is made with mode 0600; a stale file in its place (nobody
  // accepts there) is replaced. ALREADY_EXISTS when somebody listens there, NOT_FOUND when its
  // folder does not exist, PERMISSION_DENIED, else UNAVAILABLE; all with the address.
  virtual absl::StatusOr<std::unique_ptr<Listener>> Listen(const Endpoint& endpoint) = 0;
};

// The operating system's sockets.
Transport* SystemTransport();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TRANSPORT_H_
