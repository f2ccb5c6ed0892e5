// A wire that breaks: forwards one connection to a Unix socket and cuts it after so many bytes from
// the client, as if the client had been killed in the middle of whatever it was sending.

#ifndef KVSERVICE_TESTS_SERVER_CUT_PROXY_H_
#define KVSERVICE_TESTS_SERVER_CUT_PROXY_H_

#include <cstddef>
#include <memory>
#include <string>
#include <thread>

#include "kvservice/server/transport.h"

namespace kvservice::testing {

class CutProxy {
 public:
  // Listens on `path`; connects to `target_path` for the first client and no other.
  CutProxy(const std::string& path, const std::string& target_path, size_t client_bytes_max);
  // Waits for the cut, or for either end to close.
  ~CutProxy();

 private:
  void Run(const std::string& target_path);

  const size_t client_bytes_max_;
  std::unique_ptr<Listener> listener_;
  std::thread thread_;
};

// A connected Unix socket.
FileDescriptor ConnectSocket(const std::string& path);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_CUT_PROXY_H_
