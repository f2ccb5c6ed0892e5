// The server's command line: flags, over environment variables (KVSERVICE_POOL_BYTES for
// --pool-bytes), over a file (--config), over defaults.

#ifndef KVSERVICE_KVSERVICE_SERVER_CONFIG_H_
#define KVSERVICE_KVSERVICE_SERVER_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/device.h"
#include "kvservice/draw_keys.h"
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
  // Everything that is in force, one line each, in the form of a configuration file.
  std::string settings;

  ServerOptions server;
  // Those that server.identities came from.
  std::vector<std::string> identities_files;
  std::string device = "auto";
  DeviceOptions device_options;
  std::string log_level = "info";
  // Written when the server is ready, with one line per endpoint. Empty = none.
  std::string ready_file;
  // Off: engine.query_bytes_per_sequence_max counts as 0.
  bool keep_queries = true;
  // File that holds the secret of sampled certificates; empty = a fresh secret at every start.
  std::string draw_secret_file;
  // Where the access log goes: "stderr", "none", or a file that is turned over at
  // access_log_bytes_max.
  std::string access_log = "stderr";
  size_t access_log_bytes_max = size_t{64} << 20;
  // A process that dies may leave its memory, but for keys, values and sketches, in a core file;
  // and others of its user may look into it.
  bool core_dumps = false;
  // The default socket directory is used and must exist before the server listens.
  bool uses_runtime_directory = false;
};

// INVALID_ARGUMENT with one line that names the flag, for anything that is wrong.
absl::StatusOr<Config> ParseCommandLine(int argc, const char* const* argv);

// The flags whose values differ and that a reload (Server::Reload, and the log level) does not take
// over.
std::vector<std::string> NeedingRestart(const Config& before, const Config& after);
// What the files say together. Errors name the flag, the file, the entry and the field.
absl::StatusOr<IdentityMap> ReadIdentities(const std::vector<std::string>& files);

// The 32 bytes of a file that only its owner may read or write. PERMISSION_DENIED when others may
// or it belongs to somebody else, INVALID_ARGUMENT when it does not have 32 bytes, NOT_FOUND.
absl::StatusOr<DrawSecret> ReadDrawSecret(const std::string& path);

// Where the default sockets are: $XDG_RUNTIME_DIR/kvservice, else /tmp/kvservice-UID.
std::string RuntimeDirectory();

// Makes the directory with mode 0700, for sockets and for data. PERMISSION_DENIED when it belongs
// to somebody else or others may write there.
absl::Status CreatePrivateDirectory(const std::string& path);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CONFIG_H_
