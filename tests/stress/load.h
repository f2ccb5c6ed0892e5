// Load on a server of its own process: tenants with a Unix socket each, and calls of theirs that
// come when they come (open loop) or as soon as another one is answered (closed loop).
//
// Latencies count from the moment at which a call was due, whatever delays its sending.

#ifndef KVSERVICE_TESTS_STRESS_LOAD_H_
#define KVSERVICE_TESTS_STRESS_LOAD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {

// What became of calls.
struct LoadResult {
  uint64_t offered = 0;
  uint64_t good = 0;
  // Refused as OVERLOADED; and anything else.
  uint64_t shed = 0;
  uint64_t failed = 0;
  std::string first_failure;
  double seconds = 0.0;
  // [good], sorted.
  std::vector<double> latencies_ms;

  double rate() const { return static_cast<double>(good) / seconds; }
  double percentile(double share) const;
};

// A tenant of the server with one sequence that all its calls attend to; nothing is stored by them.
class Tenant {
 public:
  static absl::StatusOr<std::unique_ptr<Tenant>> Make(const std::string& endpoint,
                                                      uint32_t token_count);
  // Calls at random times (Poisson), so many a second.
  LoadResult RunOpen(double calls_per_second, double seconds, uint64_t seed);
  // So many at a time.
  LoadResult RunClosed(uint32_t callers, double seconds);

 private:
  struct Flight;
  class Flights;

  std::unique_ptr<v1::AttentionService::Stub> stub_;
  v1::AttendRequest request_;
};

// The server, until it is destroyed.
class LoadedServer {
 public:
  // A listener for each tenant, and a model. `arguments`: further flags.
  static absl::StatusOr<std::unique_ptr<LoadedServer>> Start(
      const std::vector<std::string>& tenants, const std::vector<std::string>& arguments);
  std::string endpoint(const std::string& tenant) const {
    return "unix:" + folder_.path() + "/" + tenant;
  }
  pid_t pid() const { return program_->pid(); }
  // Where its metrics are; it must have been started with --metrics-listen.
  absl::StatusOr<Endpoint> metrics_endpoint() const;
  // Tells it to end and waits; its exit status.
  int Stop();

 private:
  LoadedServer() = default;
  TemporaryFolder folder_;
  std::unique_ptr<Program> program_;
};

// Milliseconds that pass while nothing is to be done.
void Idle(double seconds);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_LOAD_H_
