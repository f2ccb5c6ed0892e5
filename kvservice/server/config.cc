#include "kvservice/server/config.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "kvservice/server/build_info.h"
#include "kvservice/server/policy_file.h"
#include "kvservice/server/quantity.h"
#include "kvservice/server/quota_flag.h"
#include "kvservice/server/transport.h"
#include "wire/default_spin.h"

namespace kvservice {
namespace {

constexpr char kSocketName[] = "kvservice.sock";
// Appended to the path of a data socket: the path of its admin socket.
constexpr char kAdminSuffix[] = ".admin";
constexpr char kNone[] = "none";
// What a reload takes over.
constexpr std::array<std::string_view, 5> kReloaded = {"drain-grace", "identities-file",
                                                       "log-level", "policy-file", "slow-call"};
constexpr uint32_t kThreadsMax = 1024;
constexpr uint32_t kSpinUsMax = 1'000'000;

// What the flags hold before it is put together.
struct Flags {
  std::vector<std::string> listen;
  std::vector<std::string> policy_files;
  std::vector<std::string> transfer_targets;
  std::vector<std::string> tenant_quotas;
  std::string admin_listen;
  std::string metrics_listen = kNone;
  std::string socket_mode = "0600";
  TlsFiles tls;
  uint32_t tls_reload_ms = 60'000;
  std::vector<std::string> identities_files;
  bool check_config = false;
  bool print_config = false;
};

// KVSERVICE_POOL_BYTES for pool-bytes.
std::string EnvironmentName(std::string flag) {
  std::transform(flag.begin(), flag.end(), flag.begin(), [](unsigned char c) {
    return c == '-' ? '_' : static_cast<char>(std::toupper(c));
  });
  return "KVSERVICE_" + flag;
}

// The command line, after what the environment says about flags that it does not have. (CLI11 would
// let the file win over the environment.)
std::vector<std::string> WithEnvironment(const CLI::App& app, int argc, const char* const* argv) {
  const std::vector<std::string> given(argv + 1, argv + argc);
  std::vector<std::string> arguments;
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_expected_max() == 0) continue;
    const std::string& name = option->get_lnames().front();
    const std::string flag = "--" + name;
    const bool is_given = std::any_of(given.begin(), given.end(), [&](const std::string& text) {
      return text == flag || text.rfind(flag + "=", 0) == 0;
    });
    const char* const value = std::getenv(EnvironmentName(name).c_str());
    if (!is_given && value != nullptr) arguments.push_back(flag + "=" + value);
  }
  arguments.insert(arguments.end(), given.begin(), given.end());
  return arguments;
}

// A number with a unit, zero only if that is the default. `target` holds the default, and the value
// after parsing.
template <typename Number>
void AddQuantity(CLI::App* app, const std::string& flag, const std::string& help, Number* target,
                 std::optional<uint64_t> (*parse)(std::string_view), std::string (*text)(uint64_t),
                 const char* type, const char* example) {
  app->add_option_function<std::string>(
         flag,
         [target, parse](const std::string& value) {
           *target = static_cast<Number>(*parse(value));
         },
         help)
      ->check(
          [parse, example, may_be_zero = *target == 0](const std::string& value) -> std::string {
            const std::optional<uint64_t> number = parse(value);
            if (!number.has_value()) return "'" + value + "' is not like " + example;
            if ((*number == 0 && !may_be_zero) || *number > std::numeric_limits<Number>::max()) {
              return "'" + value + "' is out of range";
            }
            return "";
          })
      ->default_str(text(*target))
      ->type_name(type);
}

template <typename Number>
void AddBytes(CLI::App* app, const std::string& flag, const std::string& help, Number* target) {
  AddQuantity(app, flag, help, target, ParseBytes, BytesText, "BYTES", "4GiB, 512MiB or 65536");
}

void AddTime(CLI::App* app, const std::string& flag, const std::string& help, uint32_t* target) {
  AddQuantity(app, flag, help, target, ParseMilliseconds, MillisecondsText, "TIME",
              "500ms, 10s or 5m");
}

void AddCount(CLI::App* app, const std::string& flag, const std::string& help, uint32_t* target,
              uint32_t minimum = 1, uint32_t maximum = std::numeric_limits<int32_t>::max()) {
  app->add_option(flag, *target, help)
      ->check(CLI::Range(minimum, maximum))
      ->capture_default_str()
      ->type_name("COUNT");
}

void AddChoice(CLI::App* app, const std::string& flag, const std::string& help, std::string* target,
               const std::vector<std::string>& choices) {
  app->add_option(flag, *target, help)
      ->check(CLI::IsMember(choices))
      ->capture_default_str()
      ->type_name("NAME");
}

void AddListenFlags(CLI::App* app, Flags* flags, Config* config) {
  app->add_option("--listen", flags->listen,
                  "Address to serve: unix:/path or HOST:PORT, repeatable; other than a Unix socket "
                  "or a loopback address needs --tls-cert; without TLS tenant=NAME,ADDRESS gives "
                  "its connections to a tenant "
                  "(default: unix:" +
                      RuntimeDirectory() + "/" + kSocketName + ")")
      ->check([](const std::string& text) {
        return std::string(ParseListenAddress(text).status().message());
      })
      ->take_all()
      ->type_name("ADDRESS");
  AddChoice(app, "--socket-mode",
            "Who may connect to Unix sockets of --listen: 0600 this user, 0660 its group too, 0666 "
            "everybody; admin sockets are this user's alone",
            &flags->socket_mode, {"0600", "0660", "0666"});
  app->add_option("--admin-listen", flags->admin_listen,
                  "Address of the admin side, or none (default: the first Unix socket's path "
                  "with .admin after it)")
      ->check([](const std::string& text) {
        return text == kNone ? "" : std::string(ParseEndpoint(text).status().message());
      })
      ->type_name("ADDRESS");
  app->add_option(
         "--metrics-listen", flags->metrics_listen,
         "HOST:PORT for browsers (/), Prometheus (/metrics) and probes (/livez, /readyz) over HTTP "
         "without TLS, or none; numbers alone, so it may be reached from other hosts")
      ->check([](const std::string& text) -> std::string {
        if (text == kNone) return "";
        const absl::StatusOr<Endpoint> endpoint = ParseEndpoint(text);
        if (!endpoint.ok()) return std::string(endpoint.status().message());
        return endpoint->kind == Endpoint::Kind::kTcp ? "" : text + " is not HOST:PORT";
      })
      ->capture_default_str()
      ->type_name("ADDRESS");
  app->add_option("--policy-file", flags->policy_files,
                  "JSON file of named policies, repeatable: requests may then name them")
      ->take_all()
      ->type_name("FILE");
  app->add_option("--ready-file", config->ready_file,
                  "File to write when the server is ready, one line per endpoint")
      ->type_name("FILE");
}

void AddTlsFlags(CLI::App* app, Flags* flags) {
  app->add_option("--tls-cert", flags->tls.certificate,
                  "PEM file of the server's certificate; with it every HOST:PORT, the admin side's "
                  "too, is served with TLS to clients with certificates alone")
      ->type_name("FILE");
  app->add_option("--tls-key", flags->tls.key, "PEM file of its key, which others may not read")
      ->type_name("FILE");
  app->add_option("--tls-client-ca", flags->tls.client_ca,
                  "PEM file of the authorities that sign clients' certificates")
      ->type_name("FILE");
  AddTime(app, "--tls-reload", "Time after which these three are looked at again",
          &flags->tls_reload_ms);
  app->add_option("--identities-file", flags->identities_files,
                  "JSON file that gives the URIs of clients' certificates a tenant and roles, "
                  "repeatable; read again at SIGHUP")
      ->take_all()
      ->type_name("FILE");
}

void AddQuotaFlag(CLI::App* app, Flags* flags) {
  app->add_option(
         "--tenant-quota", flags->tenant_quotas,
         "What a tenant may use, repeatable: tenant=NAME,pool-max=BYTES,"
         "pool-reserved=BYTES,disk-max=BYTES; without tenant= what everybody else may, and "
         "what is not said is not limited (default: everybody may use what nobody has "
         "reserved)")
      ->check([](const std::string& text) {
        return std::string(ParseQuotaFlag(text).status().message());
      })
      ->take_all()
      ->type_name("QUOTA");
}

void AddEngineFlags(CLI::App* app, Config* config) {
  EngineOptions* const engine = &config->server.engine;
  AddChoice(app, "--device", "Where attention runs; auto: on a GPU if there is one",
            &config->device, {"auto", "cpu", "cuda", "reference"});
  AddCount(app, "--threads", "Threads that compute; 0 = one per CPU",
           &config->device_options.thread_count, 0, kThreadsMax);
  AddBytes(app, "--pool-bytes", "Memory for keys, values and sketches, reserved at start",
           &engine->pool_bytes);
  AddBytes(app, "--host-pool-bytes",
           "Memory of the host, pinned at start, for keys and values that the GPU has no room for "
           "and reads in place; their sketches stay in --pool-bytes",
           &engine->host_pool_bytes);
  AddCount(app, "--sequences-max", "Sequences at a time", &engine->sequences_max);
  AddCount(app, "--sequences-per-tenant-max", "Sequences of one tenant at a time",
           &engine->sequences_per_tenant_max);
  AddCount(app, "--sequence-tokens-max", "Tokens of one sequence", &engine->sequence_tokens_max);
  AddCount(app, "--prefix-tokens-per-tenant-max",
           "Tokens of prompts of one tenant's sequences that others may begin with; 0 = none",
           &engine->prefix_tokens_per_tenant_max, 0);
  AddCount(app, "--models-max", "Registered models", &engine->models_max);
  AddCount(app, "--queue-calls-max", "Calls waiting for the engine", &engine->queue_calls_max);
  AddCount(app, "--rows-max", "Rows of one attend call", &engine->rows_max);
  engine->spin_us = wire::DefaultSpinUs();
  AddCount(app, "--spin-us",
           "Microseconds for which idle threads look for more calls before they sleep; costs three "
           "CPUs while calls come, with a GPU up to ten",
           &engine->spin_us, 0, kSpinUsMax);
  AddTime(app, "--lease-default", "Time after which an unused sequence expires",
          &engine->lease_default_ms);
  AddTime(app, "--lease-max", "Longest lease a caller may ask for", &engine->lease_max_ms);
  AddBytes(app, "--list-bytes-max", "Memory for the lists of one sequence",
           &engine->list_bytes_per_sequence_max);
  AddBytes(app, "--seed-bytes-max",
           "Memory for the prompt queries of one sequence, until they are used",
           &engine->seed_bytes_per_sequence_max);
}

void AddDiskFlags(CLI::App* app, Config* config) {
  app->add_option("--data-dir", config->server.engine.data_directory,
                  "Directory for suspended, evicted and durable sequences, for this server alone; "
                  "made with mode 0700 (default: none, and nothing survives the process)")
      ->type_name("DIRECTORY");
  AddBytes(app, "--disk-bytes-max",
           "Keys, values and sketches of sequences in --data-dir; files take up to twice as much",
           &config->server.engine.disk_bytes_max);
  AddBytes(
      app, "--disk-buffer-bytes",
      "Memory in which rows wait to be written to files together, 64KiB or more; twice as much "
      "meanwhile",
      &config->server.engine.disk_buffer_bytes);
  // 10 GB in about 20 minutes, and next to nothing of a disk's time.
  config->server.engine.scrub_bytes_per_s = uint64_t{8} << 20;
  AddBytes(
      app, "--scrub-bytes-per-s",
      "Read --data-dir through for damage, so much per second, once an hour at most; 0 = never",
      &config->server.engine.scrub_bytes_per_s);
}

void AddCertificateFlags(CLI::App* app, Config* config) {
  EngineOptions* const engine = &config->server.engine;
  app->add_option("--audit-rate", engine->audit_rate,
                  "Share of calls, chosen at random, to compute again exactly and compare")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->type_name("SHARE");
  AddCount(app, "--audit-rows-max", "Rows of calls kept for audits and replays",
           &engine->audit_rows_max);
  AddBytes(app, "--audit-bytes-max", "Memory for kept rows", &engine->audit_bytes_max);
  app->add_flag("--keep-queries,!--no-keep-queries", config->keep_queries,
                "Keep the latest query of every layer, for Explain")
      ->capture_default_str();
  AddBytes(app, "--query-bytes-max", "Memory for the latest queries of one sequence",
           &engine->query_bytes_per_sequence_max);
  app->add_option("--draw-secret-file", config->draw_secret_file,
                  "File of 32 secret bytes, mode 0600, behind the random numbers of sampled "
                  "certificates (default: fresh bytes at every start)")
      ->type_name("FILE");
}

void AddServerFlags(CLI::App* app, Config* config) {
  ServerOptions* const server = &config->server;
  AddCount(app, "--io-threads", "Threads that receive and parse", &server->io_threads, 1,
           kThreadsMax);
  AddBytes(app, "--message-bytes-max", "Largest message", &server->message_bytes_max);
  AddBytes(app, "--requests-bytes-max", "All requests being served together",
           &server->requests_bytes_max);
  AddBytes(app, "--transport-bytes-max", "Memory of the transport for messages on their way in",
           &server->transport_bytes_max);
  AddCount(app, "--connections-max", "Connections; more are reset", &server->connections_max);
  AddCount(app, "--connections-per-host-max",
           "Connections from one IPv4 address or IPv6 /64; more are reset",
           &server->connections_per_host_max);
  AddCount(app, "--streams-per-connection-max", "Calls at a time on one connection",
           &server->streams_per_connection_max);
  AddCount(app, "--lanes-max",
           "Clients on this host that may call through shared memory, by a socket beside each Unix "
           "socket (its path with .lane after it); 0 = none, and no such sockets",
           &server->lanes_max, 0);
  AddBytes(app, "--lane-bytes-max", "Shared memory of one such client", &server->lane_bytes_max);
  AddTime(app, "--drain-grace", "Time a drain gives to calls in flight", &server->drain_grace_ms);
  AddTime(app, "--slow-call", "Attends that take longer are logged with their stages",
          &server->slow_call_ms);
}

void AddTransferFlags(CLI::App* app, Flags* flags, Config* config) {
  app->add_option("--transfer-targets", flags->transfer_targets,
                  "Server that sequences may be sent to: unix:/path or 127.0.0.1:PORT, repeatable; "
                  "tenant=NAME,ADDRESS for those of a tenant. This server connects to no other "
                  "(default: none)")
      ->check([](const std::string& text) -> std::string {
        const absl::StatusOr<ListenAddress> target = ParseListenAddress(text);
        if (!target.ok()) return std::string(target.status().message());
        if (target->endpoint.IsLocal()) return "";
        return target->endpoint.ToString() + " is on another host, which needs TLS";
      })
      ->take_all()
      ->type_name("ADDRESS");
  AddCount(app, "--transfers-max", "Sequences on their way to other servers at a time",
           &config->server.transfers.transfers_max, 1, kThreadsMax);
  AddCount(app, "--receives-max",
           "Sequences on their way here from other servers at a time; 0 = none are taken",
           &config->server.engine.receives_max, 0);
  AddTime(app, "--receive-idle",
          "Time after which a sequence on its way here that nothing comes for is forgotten",
          &config->server.engine.receive_idle_ms);
}

void AddProcessFlags(CLI::App* app, Flags* flags, Config* config) {
  AddChoice(app, "--log-level", "Least severe messages to log to stderr", &config->log_level,
            {"trace", "debug", "info", "warn", "error", "off"});
  app->add_option("--access-log", config->access_log,
                  "Where admin calls and refused calls are written down, a line of JSON each: "
                  "stderr, none, or a file")
      ->capture_default_str()
      ->type_name("FILE");
  AddBytes(app, "--access-log-bytes-max",
           "Size at which that file is turned over; it and four older ones are kept",
           &config->access_log_bytes_max);
  app->add_flag(
         "--core-dumps,!--no-core-dumps", config->core_dumps,
         "Let the process leave a core file and debuggers attach; keys and values are not in "
         "the file either way")
      ->capture_default_str();
  app->set_config("--config", "", "File with flag=value lines")->type_name("FILE");
  app->allow_config_extras(CLI::config_extras_mode::error);
  app->set_version_flag("--version", "kvservice " + Version() + " (" + BuildDescription() + ")");
  app->add_flag("--check-config", flags->check_config, "Check the configuration and exit")
      ->configurable(false);
  app->add_flag("--print-config", flags->print_config, "Print the configuration and exit")
      ->configurable(false);
}

absl::Status Invalid(const std::string& problem) { return absl::InvalidArgumentError(problem); }

// Flags that are right one by one and wrong together.
absl::Status CheckTogether(const Config& config) {
  const ServerOptions& server = config.server;
  if (server.message_bytes_max >= size_t{2} << 30) {
    return Invalid("--message-bytes-max: must be less than 2GiB");
  }
  if (server.requests_bytes_max < server.message_bytes_max) {
    return Invalid("--requests-bytes-max: must be at least --message-bytes-max");
  }
  if (server.engine.lease_default_ms > server.engine.lease_max_ms) {
    return Invalid("--lease-default: must be at most --lease-max");
  }
  return absl::OkStatus();
}

// Where TLS is used and to whom.
absl::Status PutTlsTogether(const Flags& flags, Config* config) {
  const TlsFiles& files = flags.tls;
  const std::pair<const char*, const std::string*> named[] = {
      {"--tls-cert", &files.certificate},
      {"--tls-key", &files.key},
      {"--tls-client-ca", &files.client_ca}};
  const auto is_given = [](const auto& file) { return !file.second->empty(); };
  if (std::any_of(std::begin(named), std::end(named), is_given)) {
    for (const auto& [flag, path] : named) {
      if (path->empty()) return Invalid(std::string(flag) + ": is needed for TLS");
    }
    config->server.tls = files;
    config->server.tls->reload_s = std::max(1U, flags.tls_reload_ms / 1000);
    if (absl::Status status = CheckTlsFiles(files); !status.ok()) return status;
    if (flags.identities_files.empty()) {
      return Invalid("--identities-file: is needed with TLS, else nobody may do anything");
    }
  } else if (!flags.identities_files.empty()) {
    return Invalid("--identities-file: means something with --tls-cert alone");
  }
  config->identities_files = flags.identities_files;
  absl::StatusOr<IdentityMap> identities = ReadIdentities(flags.identities_files);
  if (!identities.ok()) return identities.status();
  config->server.identities = *std::move(identities);
  return absl::OkStatus();
}

// Nobody on another host reaches the server without TLS.
absl::Status CheckAddress(const char* flag, const Endpoint& endpoint, const Config& config) {
  if (endpoint.IsLocal() || config.server.tls.has_value()) return absl::OkStatus();
  return Invalid(std::string(flag) + ": " + endpoint.ToString() +
                 " can be reached from other hosts, which needs TLS: give --tls-cert, --tls-key "
                 "and --tls-client-ca, or use a Unix socket or a loopback address");
}

absl::Status CheckAddresses(const Config& config) {
  for (const ListenAddress& address : config.server.listen) {
    absl::Status status = CheckAddress("--listen", address.endpoint, config);
    if (!status.ok()) return status;
    if (address.names_tenant && config.server.tls.has_value() &&
        address.endpoint.kind == Endpoint::Kind::kTcp) {
      return Invalid("--listen: " + address.endpoint.ToString() +
                     " has TLS: tenants follow from clients' certificates, not from tenant=");
    }
  }
  if (!config.server.admin_listen.has_value()) return absl::OkStatus();
  return CheckAddress("--admin-listen", *config.server.admin_listen, config);
}

absl::StatusOr<Config> PutTogether(const Flags& flags, Config config) {
  const std::string default_path = RuntimeDirectory() + "/" + kSocketName;
  std::vector<std::string> listen = flags.listen;
  if (listen.empty()) listen.push_back("unix:" + default_path);
  std::string admin_path = default_path;
  bool any_unix = false;
  for (const std::string& text : listen) {
    absl::StatusOr<ListenAddress> address = ParseListenAddress(text);
    if (!address.ok()) return Invalid("--listen: " + std::string(address.status().message()));
    if (!any_unix && address->endpoint.kind == Endpoint::Kind::kUnix) {
      any_unix = true;
      admin_path = address->endpoint.path;
    }
    address->endpoint.socket_mode =
        static_cast<uint32_t>(std::strtoul(flags.socket_mode.c_str(), nullptr, 8));
    config.server.listen.push_back(*std::move(address));
  }
  const bool default_admin = flags.admin_listen.empty();
  config.uses_runtime_directory = flags.listen.empty() || (default_admin && !any_unix);
  if (flags.admin_listen != kNone) {
    const std::string text =
        default_admin ? "unix:" + admin_path + kAdminSuffix : flags.admin_listen;
    absl::StatusOr<Endpoint> endpoint = ParseEndpoint(text);
    if (!endpoint.ok()) {
      return Invalid("--admin-listen: " + std::string(endpoint.status().message()));
    }
    config.server.admin_listen = *std::move(endpoint);
  }
  for (const std::string& text : flags.transfer_targets) {
    absl::StatusOr<ListenAddress> target = ParseListenAddress(text);
    if (!target.ok()) {
      return Invalid("--transfer-targets: " + std::string(target.status().message()));
    }
    config.server.transfers.targets.push_back(*std::move(target));
  }
  if (flags.metrics_listen != kNone) {
    absl::StatusOr<Endpoint> endpoint = ParseEndpoint(flags.metrics_listen);
    if (!endpoint.ok()) {
      return Invalid("--metrics-listen: " + std::string(endpoint.status().message()));
    }
    config.server.metrics_listen = *std::move(endpoint);
  }
  const absl::Status quotas = AddQuotaFlags(flags.tenant_quotas, &config.server.engine);
  if (!quotas.ok()) return Invalid("--tenant-quota: " + std::string(quotas.message()));
  absl::Status status = CheckTogether(config);
  if (status.ok()) status = PutTlsTogether(flags, &config);
  if (status.ok()) status = CheckAddresses(config);
  if (!status.ok()) return status;
  for (const std::string& path : flags.policy_files) {
    const absl::Status added = AddPolicyFile(path, &config.server.policies);
    if (!added.ok()) return Invalid("--policy-file: " + std::string(added.message()));
  }
  return config;
}

// The addresses in force, in the form of a configuration file.
std::string AddressLines(const ServerOptions& server) {
  std::string text = "listen=[";
  const char* separator = "";
  for (const ListenAddress& address : server.listen) {
    text += separator;
    const bool has_tls = server.tls.has_value() && address.endpoint.kind == Endpoint::Kind::kTcp;
    const std::string tenant = has_tls ? "" : "tenant=" + address.tenant + ",";
    text += "\"" + tenant + address.endpoint.ToString() + "\"";
    separator = ", ";
  }
  const std::string admin =
      server.admin_listen.has_value() ? server.admin_listen->ToString() : kNone;
  return text + "]\nadmin-listen=\"" + admin + "\"\n";
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

}  // namespace

absl::StatusOr<Config> ParseCommandLine(int argc, const char* const* argv) {
  Config config;
  Flags flags;
  CLI::App app("Owns the KV caches of language models and attends next to the data.", "kvservice");
  app.footer(
      "Flags come before the environment (KVSERVICE_POOL_BYTES for --pool-bytes), the environment "
      "before the file.");
  AddListenFlags(&app, &flags, &config);
  AddTlsFlags(&app, &flags);
  AddEngineFlags(&app, &config);
  AddQuotaFlag(&app, &flags);
  AddDiskFlags(&app, &config);
  AddCertificateFlags(&app, &config);
  AddServerFlags(&app, &config);
  AddTransferFlags(&app, &flags, &config);
  AddProcessFlags(&app, &flags, &config);
  std::vector<std::string> arguments = WithEnvironment(app, argc, argv);
  // The library wants them last first.
  std::reverse(arguments.begin(), arguments.end());
  try {
    app.parse(arguments);
  } catch (const CLI::CallForVersion& version) {
    config.text = std::string(version.what()) + "\n";
  } catch (const CLI::CallForHelp&) {
    config.text = app.help();
  } catch (const CLI::FileError& error) {
    return Invalid("--config: " + OneLine(error.what()));
  } catch (const CLI::Error& error) {
    return Invalid(OneLine(error.what()));
  }
  if (!config.text.empty()) {
    config.action = Config::Action::kPrint;
    return config;
  }
  absl::StatusOr<Config> result = PutTogether(flags, std::move(config));
  if (!result.ok()) return result;
  // As given they may be empty: the effective ones are printed instead.
  app.get_option("--listen")->configurable(false);
  app.get_option("--admin-listen")->configurable(false);
  // None would be printed as a file without a name.
  if (flags.policy_files.empty()) app.get_option("--policy-file")->configurable(false);
  if (flags.transfer_targets.empty()) app.get_option("--transfer-targets")->configurable(false);
  if (flags.tenant_quotas.empty()) app.get_option("--tenant-quota")->configurable(false);
  if (flags.identities_files.empty()) app.get_option("--identities-file")->configurable(false);
  result->settings = AddressLines(result->server) + app.config_to_str(true);
  if (flags.check_config || flags.print_config) {
    result->action = Config::Action::kPrint;
    result->text = flags.print_config ? result->settings : "the configuration is valid\n";
  }
  return result;
}

std::vector<std::string> NeedingRestart(const Config& before, const Config& after) {
  std::set<std::string> old_settings;
  std::istringstream old_lines(before.settings);
  for (std::string line; std::getline(old_lines, line);) old_settings.insert(line);
  std::istringstream new_lines(after.settings);
  std::vector<std::string> names;
  for (std::string line; std::getline(new_lines, line);) {
    const std::string name = line.substr(0, line.find('='));
    const bool can_change = std::find(kReloaded.begin(), kReloaded.end(), name) != kReloaded.end();
    if (!can_change && !old_settings.contains(line)) names.push_back("--" + name);
  }
  return names;
}

absl::StatusOr<IdentityMap> ReadIdentities(const std::vector<std::string>& files) {
  IdentityMap identities;
  for (const std::string& path : files) {
    const absl::Status added = identities.AddFile(path);
    if (!added.ok()) return Invalid("--identities-file: " + std::string(added.message()));
  }
  return identities;
}

absl::StatusOr<DrawSecret> ReadDrawSecret(const std::string& path) {
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat facts = {};
  if (file.get() < 0 || fstat(file.get(), &facts) != 0) {
    return absl::NotFoundError("--draw-secret-file: cannot read " + path + ": " +
                               std::strerror(errno));
  }
  if (!S_ISREG(facts.st_mode) || facts.st_uid != geteuid() ||
      (facts.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    return absl::PermissionDeniedError("--draw-secret-file: " + path +
                                       " must be a file of this user's own with mode 0600");
  }
  DrawSecret secret;
  // One byte more than there may be tells a longer file.
  std::array<std::byte, kDrawSecretBytes + 1> bytes;
  const ssize_t count = read(file.get(), bytes.data(), bytes.size());
  if (count != static_cast<ssize_t>(secret.size())) {
    return absl::InvalidArgumentError("--draw-secret-file: " + path + " must have exactly " +
                                      std::to_string(secret.size()) + " bytes");
  }
  std::copy_n(bytes.begin(), secret.size(), secret.begin());
  return secret;
}

std::string RuntimeDirectory() {
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && *runtime == '/') return std::string(runtime) + "/kvservice";
  return "/tmp/kvservice-" + std::to_string(getuid());
}

absl::Status CreatePrivateDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::UnavailableError("cannot create " + path + ": " + std::strerror(errno));
  }
  struct stat entry {};
  const bool ours = lstat(path.c_str(), &entry) == 0 && S_ISDIR(entry.st_mode) &&
                    entry.st_uid == getuid() && (entry.st_mode & (S_IWGRP | S_IWOTH)) == 0;
  if (ours) return absl::OkStatus();
  return absl::PermissionDeniedError(path + " is not a directory that only this user may write to");
}

}  // namespace kvservice
