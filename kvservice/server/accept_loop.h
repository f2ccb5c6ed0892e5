// Accepts connections and hands them on, whatever happens: above its limits it resets new ones, out
// of file descriptors it sheds one by one and recovers on its own.

#ifndef KVSERVICE_KVSERVICE_SERVER_ACCEPT_LOOP_H_
#define KVSERVICE_KVSERVICE_SERVER_ACCEPT_LOOP_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "kvservice/clock.h"
#include "kvservice/server/transport.h"

namespace kvservice {

struct ConnectionLimits {
  size_t total = 0;
  // From one host: an IPv4 address or the /64 of an IPv6 one. Unix sockets do not count.
  size_t per_host = std::numeric_limits<size_t>::max();
};

// Open connections that somebody else owns. Whether one is still open is found out by asking the
// system whether its descriptor still names the same socket, so the owner (gRPC) need not tell. One
// thread.
class ConnectionTable {
 public:
  explicit ConnectionTable(const ConnectionLimits& limits) : limits_(limits) {}
  // False when there is no room for another one of `host` ("" = of none). `now_ns` bounds how often
  // a full table is searched for closed connections.
  bool HasRoom(const std::string& host, uint64_t now_ns);
  void Add(int fd, const std::string& host);

 private:
  struct Entry {
    int fd;
    dev_t device;
    ino_t inode;
    std::string host;
  };
  bool MayAdd(const std::string& host) const;
  bool IsOpen(const Entry& entry) const;

  const ConnectionLimits limits_;
  std::vector<Entry> entries_;
  std::map<std::string, size_t> count_of_host_;
  uint64_t next_sweep_ns_ = 0;
};

class AcceptLoop {
 public:
  // Called on the loop's thread with the index of the listener; takes the descriptor over.
  using Deliver = absl::AnyInvocable<void(size_t listener, FileDescriptor connection)>;

  // Starts the thread. `clock` is borrowed.
  AcceptLoop(std::vector<std::unique_ptr<Listener>> listeners, const ConnectionLimits& limits,
             Clock* clock, Deliver deliver);
  ~AcceptLoop();

  // Closes the listeners; nothing is delivered afterwards. Idempotent; not from the loop's thread.
  void Stop();

  uint64_t accepted_count() const { return accepted_count_; }
  // Connections reset because of the cap or for want of descriptors.
  uint64_t shed_count() const { return shed_count_; }

 private:
  void Run();
  void AcceptAll(size_t listener);
  void AcceptOne(size_t listener, FileDescriptor connection);
  bool ShedForDescriptors(size_t listener);

  Clock* const clock_;
  Deliver deliver_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  ConnectionTable table_;
  // Given up for a moment when descriptors run out: a waiting connection must be accepted before it
  // can be reset.
  FileDescriptor reserve_;
  // Written to by Stop.
  FileDescriptor wake_;
  bool out_of_descriptors_ = false;

  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> accepted_count_{0};
  std::atomic<uint64_t> shed_count_{0};
  std::thread thread_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_ACCEPT_LOOP_H_
