// A kvservice of its own process, for measuring what a caller on the same host sees.

#ifndef KVSERVICE_TESTS_BENCH_SERVER_PROCESS_H_
#define KVSERVICE_TESTS_BENCH_SERVER_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace kvservice::bench {

// Runs the kvservice that lies beside this program, on a Unix socket in a folder of its own, until
// it is destroyed.
class ServerProcess {
 public:
  // arguments: further flags. Waits until the server is ready; UNAVAILABLE when it ends before that
  // or is silent for a minute.
  static absl::StatusOr<std::unique_ptr<ServerProcess>> Start(std::vector<std::string> arguments);
  ~ServerProcess();
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  // For ClientOptions.
  std::string endpoint() const { return "unix:" + folder_ + "/kvservice.sock"; }

 private:
  ServerProcess(pid_t pid, int output, std::string folder)
      : pid_(pid), output_(output), folder_(std::move(folder)) {}
  // Waits for the line that says so.
  bool IsReady() const;

  const pid_t pid_;
  const int output_;  // what the server prints
  const std::string folder_;
};

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_SERVER_PROCESS_H_
