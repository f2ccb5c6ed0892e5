// The server's command line: flags, over environment variables (KVSERVICE_POOL_BYTES for
// --pool-bytes), over a file (--config), over defaults.

#ifndef KVSERVICE_KVSERVICE_SERVER_CONFIG_H_
#define KVSERVICE_KVSERVICE_SERVER_CONFIG_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/server/server.h"

namespace kvservice {

struct Config {
  enum class Action : uint8_t {
    kServe,
    // Print `text` to stdout and exit with 0: --help, --version, --check-config, --print-config.
    kPrint,
  };
  Action action = Action::kServe;
  std::string text;

  ServerOptions server;
  std::string device = "auto";
  DeviceOptions device_options;
  std::string log_level = "info";
  // Written when the server is ready, with one line per endpoint. Empty = none.
  std::string ready_file;
  // The default socket directory is used and must exist before the server listens.
  bool uses_runtime_directory = false;
};

// INVALID_ARGUMENT with one line that names the flag, for anything that is wrong.
absl::StatusOr<Config> ParseCommandLine(int argc, const char* const* argv);

// Where the default sockets are: $XDG_RUNTIME_DIR/kvservice, else /tmp/kvservice-UID.
std::string RuntimeDirectory();

// Makes the directory with mode 0700. PERMISSION_DENIED when it belongs to somebody else or others
// may write there.
absl::Status CreateRuntimeDirectory(const std::string& path);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CONFIG_H_
