// How a client connects, waits and repeats. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_OPTIONS_H_
#define KVSERVICE_CLIENT_OPTIONS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace kvservice::client {

// Every call has one, with its retries and the pauses between them.
struct Deadlines {
  std::chrono::milliseconds connect{5'000};
  // Attend and everything about one sequence.
  std::chrono::milliseconds data{2'000};
  // RegisterModel, and each stream of an AppendWriter.
  std::chrono::milliseconds admin{30'000};
};

// UNAVAILABLE alone is worth repeating without knowing more. The pause before attempt n + 1 is
// random between a half of and the whole of backoff_first * 2^(n - 1), at most backoff_max, and
// never less than what the server asked for.
struct RetryOptions {
  // 1 = never repeat.
  uint32_t attempts_max = 5;
  std::chrono::milliseconds backoff_first{20};
  std::chrono::milliseconds backoff_max{1'000};
};

// How calls of attention travel; everything else goes through gRPC.
enum class Transport : uint8_t {
  // The fastest that works.
  kAuto,
  // A gRPC call each.
  kUnary,
  // gRPC streams that stay open.
  kStream,
  // Memory shared with a server on the same host (docs/architecture.md), reached by the socket
  // beside the Unix socket that `endpoint` names.
  kLane,
};

// The shared memory of a client. A call for which there is no room travels as kStream.
struct LaneOptions {
  // At a time, 1 to 16.
  uint32_t calls_max = 8;
  // Tensors and message of one call, in either direction; takes memory only as it is used.
  size_t call_bytes_max = size_t{2} << 20;
  // For how long a calling thread looks for the answer before it sleeps: sooner awake, and a CPU
  // busy meanwhile. Default: 500 us with eight CPUs or more, else not at all.
  std::optional<std::chrono::microseconds> spin = {};
};

// PEM files of a client that meets a server on another host. They are looked at again every minute:
// certificates may change while the client runs.
struct TlsOptions {
  // Authorities that sign the server's certificate.
  std::string ca_file = {};
  // The client's certificate with those between it and its authority, and its key. The one URI
  // among the certificate's names says to the server who this is.
  std::string certificate_file = {};
  std::string key_file = {};
  // Name that the server's certificate must have instead of the endpoint's host.
  std::string server_name = {};
};

struct ClientOptions {
  // "unix:/absolute/path" or "HOST:PORT".
  std::string endpoint = {};
  // With TLS; for HOST:PORT alone.
  std::optional<TlsOptions> tls = {};
  Deadlines deadlines = {};
  RetryOptions retry = {};
  // Largest message in either direction; the server has a limit of its own.
  size_t message_bytes_max = size_t{64} << 20;
  // With kLane Connect fails when there is none: FAILED_PRECONDITION / LANE_UNAVAILABLE. Single
  // calls may always take a slower way.
  Transport transport = Transport::kAuto;
  LaneOptions lane = {};
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_OPTIONS_H_
