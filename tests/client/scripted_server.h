// A server that answers what a test tells it to: errors in a row, replies that do not fit.

#ifndef KVSERVICE_TESTS_CLIENT_SCRIPTED_SERVER_H_
#define KVSERVICE_TESTS_CLIENT_SCRIPTED_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::testing {

struct ScriptedError {
  // Canonical gRPC code.
  int code = 0;
  // Empty: no details, as from a broken connection.
  std::string reason;
  uint32_t retry_delay_ms = 0;
};

// Listens on a Unix socket while it lives. Scripts are set before the calls that use them.
class ScriptedServer {
 public:
  explicit ScriptedServer(const std::string& endpoint);
  ~ScriptedServer();

  // The next calls of any method fail like this, in this order; then they are answered.
  void FailNext(std::vector<ScriptedError> errors);
  // Changes the well-formed answer to an Attend.
  void EditAttend(std::function<void(v1::AttendResponse*)> edit);

  // Calls of any method that arrived.
  uint32_t call_count() const;
  // Ids of the Create requests that arrived.
  std::vector<std::string> request_ids() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_CLIENT_SCRIPTED_SERVER_H_
