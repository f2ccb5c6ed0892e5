// What gRPC alone takes there and back: a process whose only method returns the bytes it gets, on a
// Unix socket, and a client that sends and takes bytes without looking at them. Both sides use
// completion queues and nothing is parsed, so that this is the floor of whatever goes by gRPC.

#ifndef KVSERVICE_TESTS_BENCH_GRPC_ECHO_H_
#define KVSERVICE_TESTS_BENCH_GRPC_ECHO_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace kvservice::bench {

// The process itself: serves the path until it is killed.
int ServeGrpcEcho(const std::string& path);

// One thread.
class GrpcEcho {
 public:
  // Starts a server on the CPUs that the calling thread may use.
  static absl::StatusOr<std::unique_ptr<GrpcEcho>> Start(size_t bytes);
  virtual ~GrpcEcho() = default;

  // There and back once, by a call of its own and by a stream that stays open; answered by the
  // thread that has received it, or handed to another one as a service's work is. False when
  // something else came back than as many bytes.
  virtual bool CallUnary(bool by_thread) = 0;
  virtual bool CallStream(bool by_thread) = 0;
};

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_GRPC_ECHO_H_
