// The server program. Exit status: 0 after a drain, 78 for a bad configuration, 1 for anything
// else.

#include <grpc/support/log.h>
#include <malloc.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "attention/device.h"
#include "kvservice/engine.h"
#include "kvservice/server/access_log.h"
#include "kvservice/server/build_info.h"
#include "kvservice/server/config.h"
#include "kvservice/server/notify.h"
#include "kvservice/server/server.h"
#include "kvservice/server/transport.h"

namespace kvservice {
namespace {

// EX_CONFIG of sysexits.h.
constexpr int kExitConfig = 78;

// Buffers of messages come and go all the time; glibc would hand each back to the kernel and fetch
// it again.
constexpr int kMmapThresholdBytes = 1 << 30;
constexpr int kTrimThresholdBytes = 1 << 30;
constexpr int kTopPadBytes = 64 << 20;

int FailConfig(const absl::Status& status) {
  std::cerr << "kvservice: " << status.message() << std::endl;
  return kExitConfig;
}

// Debian's abseil looks for deadlocks at every lock of gRPC's.
void TrustLockOrder() { absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore); }

void KeepFreedMemory() {
  mallopt(M_MMAP_THRESHOLD, kMmapThresholdBytes);
  mallopt(M_TRIM_THRESHOLD, kTrimThresholdBytes);
  mallopt(M_TOP_PAD, kTopPadBytes);
}

// Every connection is a descriptor.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// Wakes the thread that waits for signals; from outside it means nothing.
constexpr int kWakeSignal = SIGUSR1;

sigset_t AwaitedSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  sigaddset(&signals, kWakeSignal);
  return signals;
}

spdlog::level::level_enum LevelOf(const Config& config) {
  return spdlog::level::from_str(config.log_level == "error" ? "err" : config.log_level);
}

// Takes the configuration again, from the same command line, environment and files. What is wrong
// with it changes nothing but the log.
class Reloader {
 public:
  Reloader(int argc, const char* const* argv, Config config)
      : argc_(argc), argv_(argv), config_(std::move(config)) {}

  void Reload(Server* server, spdlog::logger* logger) {
    absl::StatusOr<Config> config = ParseCommandLine(argc_, argv_);
    absl::Status status = config.status();
    if (status.ok()) status = server->Reload(config->server);
    if (!status.ok()) {
      logger->error("reload refused, nothing has changed: {}", std::string(status.message()));
      return;
    }
    logger->set_level(LevelOf(*config));
    for (const std::string& name : NeedingRestart(config_, *config)) {
      logger->warn("{} has changed and needs a restart", name);
    }
    logger->info("configuration reloaded");
  }

 private:
  const int argc_;
  const char* const* const argv_;
  // What the process started with.
  const Config config_;
};

// Turns the first SIGTERM or SIGINT into a drain; a second one ends the process at once. SIGHUP is
// a reload.
class SignalThread {
 public:
  SignalThread(Server* server, Reloader* reloader, spdlog::logger* logger)
      : thread_([this, server, reloader, logger] { Run(server, reloader, logger); }) {}
  ~SignalThread() {
    stopping_ = true;
    pthread_kill(thread_.native_handle(), kWakeSignal);
    thread_.join();
  }

 private:
  void Run(Server* server, Reloader* reloader, spdlog::logger* logger) {
    const sigset_t signals = AwaitedSignals();
    bool draining = false;
    for (;;) {
      int signal = 0;
      sigwait(&signals, &signal);
      if (stopping_) return;
      if (signal == kWakeSignal) continue;
      if (signal == SIGHUP) {
        NotifyManager("RELOADING=1");
        reloader->Reload(server, logger);
        NotifyManager("READY=1");
        continue;
      }
      if (draining) _exit(128 + signal);
      draining = true;
      logger->info("draining on {}", signal == SIGINT ? "SIGINT" : "SIGTERM");
      server->RequestDrain(0);
    }
  }

  const std::vector<std::string> identities_files_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// Everything a stranger needs to connect: on stdout, and in the ready file if there is one.
bool Announce(const Server& server, const std::string& ready_file) {
  std::string text;
  for (const Endpoint& endpoint : server.endpoints()) {
    text += "listening on " + endpoint.ToString() + "\n";
  }
  if (server.admin_endpoint().has_value()) {
    text += "admin on " + server.admin_endpoint()->ToString() + "\n";
  }
  if (server.metrics_endpoint().has_value()) {
    text += "metrics on " + server.metrics_endpoint()->ToString() + "\n";
  }
  text += "ready\n";
  if (!ready_file.empty()) {
    // Renamed into place, so that whoever waits for the file finds it complete.
    const std::string partial = ready_file + ".partial";
    std::ofstream(partial) << text;
    if (std::rename(partial.c_str(), ready_file.c_str()) != 0) return false;
  }
  NotifyManager("READY=1");
  std::cout << text << std::flush;
  return true;
}

void TellWhatWasFound(const std::string& directory, const EngineStats& stats,
                      spdlog::logger* logger) {
  if (!stats.disk_was_closed) {
    logger->warn("{} was not closed: what was only in memory is gone", directory);
  }
  logger->info("{} has {} sequences in {} MiB", directory, stats.sequences_on_disk,
               stats.disk_bytes_used >> 20);
  if (stats.sequences_lost > 0) {
    logger->error("{} sequences are damaged or gone: they answer DATA_LOSS until they are dropped",
                  stats.sequences_lost);
  }
}

absl::StatusOr<std::unique_ptr<Engine>> StartEngine(const Config& config,
                                                    const std::optional<DrawSecret>& draw_secret,
                                                    spdlog::logger* logger) {
  DeviceOptions device_options = config.device_options;
  device_options.spin_us = config.server.engine.spin_us;
  absl::StatusOr<std::unique_ptr<Device>> device = NewDevice(config.device, device_options);
  if (!device.ok()) return device.status();
  EngineOptions options = config.server.engine;
  options.draw_secret = draw_secret;
  if (!config.keep_queries) options.query_bytes_per_sequence_max = 0;
  options.on_audit_violation = [logger](const std::string& violation) {
    logger->error("audit violation: {}", violation);
  };
  auto engine = NewEngine(options, *std::move(device), SystemClock(), SystemRandom());
  if (engine.ok() && !options.data_directory.empty()) {
    TellWhatWasFound(options.data_directory, (*engine)->Stats(), logger);
  }
  return engine;
}

// gRPC writes a line for every handshake that fails, and strangers can make those fail all day. Its
// log has no context, so the numbers live here; that two threads may count one line for another's
// second does no harm.
void WriteGrpcLine(gpr_log_func_args* line) {
  constexpr uint32_t kLinesPerSecondMax = 20;
  static std::atomic<uint64_t> second{0};
  static std::atomic<uint32_t> count{0};
  const uint64_t now = SystemClock()->SteadyNowNs() / 1'000'000'000;
  if (second.exchange(now) != now) count = 0;
  if (count.fetch_add(1) >= kLinesPerSecondMax) return;
  std::fprintf(stderr, "[grpc] %s:%d %s\n", line->file, line->line, line->message);
}

absl::StatusOr<AccessLog::Sink> OpenAccessLog(const Config& config) {
  if (config.access_log == "stderr") {
    return [](const std::string& line) { std::cerr << line + "\n" << std::flush; };
  }
  absl::StatusOr<AccessLog::Sink> sink =
      NewAccessLogFile(config.access_log, config.access_log_bytes_max);
  if (sink.ok()) return sink;
  return absl::Status(sink.status().code(),
                      "--access-log: " + std::string(sink.status().message()));
}

int Serve(const Config& config, Reloader* reloader, spdlog::logger* logger) {
  std::optional<AccessLog> access_log;
  if (config.access_log != "none") {
    absl::StatusOr<AccessLog::Sink> sink = OpenAccessLog(config);
    if (!sink.ok()) return FailConfig(sink.status());
    access_log.emplace(SystemClock(), *std::move(sink));
  }
  if (config.uses_runtime_directory) {
    const absl::Status directory = CreatePrivateDirectory(RuntimeDirectory());
    if (!directory.ok()) return FailConfig(directory);
  }
  if (!config.server.engine.data_directory.empty()) {
    const absl::Status directory = CreatePrivateDirectory(config.server.engine.data_directory);
    if (!directory.ok()) return FailConfig(directory);
  }
  std::optional<DrawSecret> draw_secret;
  if (!config.draw_secret_file.empty()) {
    const absl::StatusOr<DrawSecret> read = ReadDrawSecret(config.draw_secret_file);
    if (!read.ok()) return FailConfig(read.status());
    draw_secret = *read;
  }
  absl::StatusOr<std::unique_ptr<Engine>> engine = StartEngine(config, draw_secret, logger);
  if (!engine.ok()) {
    logger->critical("cannot start the engine: {}", std::string(engine.status().message()));
    return engine.status().code() == absl::StatusCode::kInvalidArgument ? kExitConfig : 1;
  }
  absl::StatusOr<std::unique_ptr<Server>> server =
      NewServer(config.server, engine->get(),
                {.clock = SystemClock(),
                 .random = SystemRandom(),
                 .transport = SystemTransport(),
                 .logger = logger,
                 .access_log = access_log ? &*access_log : nullptr});
  if (!server.ok()) {
    logger->critical("cannot serve: {}", std::string(server.status().message()));
    return server.status().code() == absl::StatusCode::kInvalidArgument ? kExitConfig : 1;
  }
  const SignalThread signals(server->get(), reloader, logger);
  logger->info("kvservice {} on device {}, pool {} MiB, host pool {} MiB", Version(),
               (*engine)->device_name(), config.server.engine.pool_bytes >> 20,
               config.server.engine.host_pool_bytes >> 20);
  if (!Announce(**server, config.ready_file)) {
    logger->critical("cannot write {}", config.ready_file);
    return 1;
  }
  const uint32_t grace_ms = (*server)->WaitForDrainRequest();
  logger->info("draining, up to {} ms", grace_ms);
  NotifyManager("STOPPING=1");
  (*server)->Drain(grace_ms);
  logger->info("drained");
  return 0;
}

// Tensors of tenants stay in the process: no core file (a limit of 1 stops handlers behind a pipe
// as well, where 0 does not), nobody of the same user looks in, and files are the owner's alone.
void KeepToOurselves(bool core_dumps) {
  umask(S_IRWXG | S_IRWXO);
  if (core_dumps) return;
  const rlimit none{.rlim_cur = 1, .rlim_max = 1};
  setrlimit(RLIMIT_CORE, &none);
  prctl(PR_SET_DUMPABLE, 0);
}

int Main(int argc, const char* const* argv) {
  absl::StatusOr<Config> config = ParseCommandLine(argc, argv);
  if (!config.ok()) return FailConfig(config.status());
  if (config->action == Config::Action::kPrint) {
    std::cout << config->text;
    return 0;
  }
  KeepToOurselves(config->core_dumps);
  gpr_set_log_function(WriteGrpcLine);
  KeepFreedMemory();
  TrustLockOrder();
  RaiseDescriptorLimit();
  const sigset_t signals = AwaitedSignals();
  // Before any thread exists, so that all of them inherit it and only ours takes the signals.
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  spdlog::logger logger("kvservice", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger.set_level(LevelOf(*config));
  logger.flush_on(spdlog::level::info);
  Reloader reloader(argc, argv, *config);
  return Serve(*config, &reloader, &logger);
}

}  // namespace
}  // namespace kvservice

int main(int argc, char** argv) { return kvservice::Main(argc, argv); }
