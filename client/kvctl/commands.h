// What kvctl can do. A command prints its result to stdout, diagnostics to stderr, and returns the
// program's exit status. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_COMMANDS_H_
#define KVSERVICE_CLIENT_KVCTL_COMMANDS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/options.h"

namespace kvservice::client {

enum Exit : int {
  kExitOk = 0,
  kExitFailed = 1,
  kExitUsage = 2,
  kExitNotFound = 3,
  kExitUnavailable = 4,
  kExitDeadline = 5,
  kExitAuth = 6,
  kExitUnhealthy = 7,
  // An audit found a certificate that was wrong.
  kExitViolation = 8,
  // SIGINT, as shells count it.
  kExitInterrupted = 130,
};

struct GlobalOptions {
  std::string endpoint;
  std::string admin_endpoint;
  // For endpoints that are HOST:PORT.
  std::optional<TlsOptions> tls;
  std::chrono::milliseconds timeout{30'000};
  bool json = false;
  // Nothing on stdout or stderr: the exit status tells it all.
  bool quiet = false;
  // Look again after so long; 0 = look once. How often at most; 0 = until interrupted.
  std::chrono::milliseconds watch{0};
  uint32_t watch_count = 0;
};

struct SequenceForkOptions {
  std::string hex_id;
  // Absent = all that every layer has.
  std::optional<uint32_t> length_tokens;
  // 0 = the server's default.
  std::chrono::milliseconds lease{0};
};

struct BlockOptions {
  std::string hex_id;
  uint32_t index = 0;
  // One layer, with attention; absent = all without.
  std::optional<uint32_t> layer;
  // Of a list.
  uint32_t limit = 64;
};

struct SequenceListOptions {
  // Empty = all.
  std::string tenant;
  size_t limit = 1000;
};

struct SequenceDropOptions {
  std::string hex_id;
  std::optional<uint64_t> expected_generation;
  bool yes = false;
};

struct TransferOptions {
  std::string hex_id;
  std::string target_endpoint;
  bool move = false;
};

struct AuditOptions {
  // Empty = what the server's own audits have found since it started.
  std::string hex_id;
  uint32_t call_count = 16;
  uint32_t keep_next = 0;
  // "EPOCH:SECRET:CALL:ROW" as a reply of the sequence told them; the first two in hexadecimal.
  std::string replay;
};

struct ExplainOptions {
  std::string hex_id;
  uint32_t layer = 0;
  // Empty = the server's ladder.
  std::vector<float> limits;
};

// Where a server without flags listens: $XDG_RUNTIME_DIR/kvservice, else /tmp/kvservice-UID.
std::string DefaultEndpoint();
// The admin side of a server with that endpoint and without an admin flag: the socket's path with
// .admin after it; of a TCP endpoint, the default path's.
std::string DefaultAdminEndpoint(const std::string& endpoint);

int CheckHealth(const GlobalOptions& options, const std::string& service);
// Asks no server.
int ShowVersion(const GlobalOptions& options);
int ShowServerInfo(const GlobalOptions& options);
int ShowServerStats(const GlobalOptions& options);
// Without `yes` a person must type a word at the terminal; without a terminal nothing is done.
// kExitUnhealthy if anything was damaged, mended or not.
int VerifyStore(const GlobalOptions& options);
int DrainServer(const GlobalOptions& options, std::chrono::milliseconds grace, bool yes);
int ListSequences(const GlobalOptions& options, const SequenceListOptions& list);
int ShowSequence(const GlobalOptions& options, const std::string& hex_id);
// Asks for confirmation as DrainServer does.
int DropSequence(const GlobalOptions& options, const SequenceDropOptions& drop);
// To disk and back, for a sequence of the endpoint's tenant. Prints it as it then is.
int SuspendSequence(const GlobalOptions& options, const std::string& hex_id);
int ResumeSequence(const GlobalOptions& options, const std::string& hex_id);
// From the endpoint's server to another one, for a sequence of the endpoint's tenant. Prints what
// it is called there.
int TransferSequence(const GlobalOptions& options, const TransferOptions& transfer);
// A copy-on-write child of the endpoint's tenant, which is forgotten when its lease ends. Prints
// it.
int ForkSequence(const GlobalOptions& options, const SequenceForkOptions& fork);
// Where blocks are, their checksums and norms, and the attention that a layer's latest query pays
// to them; never their values.
int ListBlocks(const GlobalOptions& options, const BlockOptions& block);
int ShowBlock(const GlobalOptions& options, const BlockOptions& block);
// kExitViolation if a certificate without failure probability was wrong, if misses are more than
// chance explains, or if a replay differs.
int AuditCalls(const GlobalOptions& options, const AuditOptions& audit);
// What limits would cost for the latest query of a layer.
int ExplainSequence(const GlobalOptions& options, const ExplainOptions& explain);
int ListModels(const GlobalOptions& options);
int ShowModel(const GlobalOptions& options, const std::string& name);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_COMMANDS_H_
