// What a call costs there and back, by every way: through gRPC (unary, stream) and through shared
// memory (lane), against a floor that is measured in the same run and with the same placement: as
// many bytes written to a Unix socket, read by another process, and written back. Ways take turns.
//
// "grpc_unary" and "grpc_stream" are the floors of what goes by gRPC: as many bytes there and back
// between two processes that do nothing but gRPC (tests/bench/grpc_echo.h). "hop": the same, but
// that another thread answers than the one that has received the message.
//
// The engine has next to nothing to do: one row attends one token, and the rest of the payload
// belongs to a row that names no sequence, so that its outputs are zeros. Payloads are of the
// queries on the way there and of the outputs on the way back, alike. What the engine does all the
// same is told as "in_server".
//
// "lane_in_place" has its queries in shared memory already and reads outputs there (StepBuffers).
//
// Placements: "same" has both processes on one CPU, so that no CPU must be woken and both path
// lengths add up; "split" has one CPU each; "free" leaves it to the system. Where there are two
// CPUs "lane_spin" does so too, and has client and server look for messages before they sleep.
//
// Ratios are times the floor's. Checks: the outputs of the row that is attended are its value.

#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/bench/grpc_echo.h"
#include "tests/bench/rpc_caller.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"
#include "wire/file_descriptor.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "rpc_latency";
constexpr uint32_t kSpinUs = 500;

// CPUs of the client and of its peer; -1 = any.
struct Placement {
  const char* name;
  int client_cpu;
  int peer_cpu;
};

// The calling thread, and what it starts.
void PinTo(int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  for (int i = 0; i < static_cast<int>(std::thread::hardware_concurrency()); ++i) {
    if (cpu < 0 || i == cpu) CPU_SET(i, &cpus);
  }
  sched_setaffinity(0, sizeof(cpus), &cpus);
}

bool ReadAll(int fd, std::vector<char>* bytes) {
  size_t at = 0;
  while (at < bytes->size()) {
    const ssize_t got = read(fd, bytes->data() + at, bytes->size() - at);
    if (got <= 0) return false;
    at += static_cast<size_t>(got);
  }
  return true;
}

bool WriteAll(int fd, const std::vector<char>& bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    const ssize_t put = write(fd, bytes.data() + at, bytes.size() - at);
    if (put <= 0) return false;
    at += static_cast<size_t>(put);
  }
  return true;
}

// A process that sends back what it gets.
class Echo {
 public:
  Echo(size_t bytes, int cpu) : bytes_(bytes) {
    std::array<int, 2> ends = {-1, -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) return;
    socket_ = FileDescriptor(ends[0]);
    const FileDescriptor theirs(ends[1]);
    // Other threads of this process do not exist in the child, which makes system calls only.
    pid_ = fork();
    if (pid_ != 0) return;
    PinTo(cpu);
    close(ends[0]);
    while (ReadAll(ends[1], &bytes_) && WriteAll(ends[1], bytes_)) {
    }
    _exit(0);
  }
  ~Echo() {
    socket_ = FileDescriptor();
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
  }
  Echo(const Echo&) = delete;
  Echo& operator=(const Echo&) = delete;

  bool Call() { return WriteAll(socket_.get(), bytes_) && ReadAll(socket_.get(), &bytes_); }

 private:
  std::vector<char> bytes_;
  FileDescriptor socket_;
  pid_t pid_ = -1;
};

double Percentile(std::vector<double> samples, double share) {
  std::sort(samples.begin(), samples.end());
  return samples[static_cast<size_t>(share * static_cast<double>(samples.size() - 1))];
}

struct Way {
  const char* name;
  client::Transport transport;
  bool in_place = false;
  bool spins = false;
};

struct EchoWay {
  const char* name;
  bool is_stream;
  bool by_thread;
};
constexpr std::array<EchoWay, 4> kEchoWays = {{{"grpc_unary", false, false},
                                               {"grpc_unary_hop", false, true},
                                               {"grpc_stream", true, false},
                                               {"grpc_stream_hop", true, true}}};

class Measurement {
 public:
  Measurement(const BenchOptions& options, const Placement& placement, size_t bytes)
      : placement_(placement),
        bytes_(bytes),
        round_count_(options.quick ? 2 : 20),
        call_count_(options.quick ? 5 : (bytes > 256 << 10 ? 25 : 100)) {}

  absl::Status Run(std::vector<Row>* rows) {
    std::vector<Way> ways = {{"unary", client::Transport::kUnary},
                             {"stream", client::Transport::kStream},
                             {"lane", client::Transport::kLane},
                             {"lane_in_place", client::Transport::kLane, true}};
    if (placement_.client_cpu != placement_.peer_cpu) {
      ways.push_back({"lane_spin", client::Transport::kLane, true, true});
    }
    PinTo(placement_.peer_cpu);
    auto quiet = ServerProcess::Start({"--device=cpu", "--threads=1", "--spin-us=0"});
    auto grpc_echo = GrpcEcho::Start(bytes_);
    auto spinning =
        ServerProcess::Start({"--device=cpu", "--threads=1", absl::StrCat("--spin-us=", kSpinUs)});
    PinTo(placement_.client_cpu);
    if (!grpc_echo.ok()) return grpc_echo.status();
    if (!quiet.ok() || !spinning.ok()) return quiet.ok() ? spinning.status() : quiet.status();
    std::vector<std::unique_ptr<RpcCaller>> callers;
    for (const Way& way : ways) {
      client::ClientOptions options;
      options.endpoint = (way.spins ? *spinning : *quiet)->endpoint();
      options.transport = way.transport;
      options.lane.spin = std::chrono::microseconds(way.spins ? kSpinUs : 0);
      options.deadlines.data = std::chrono::seconds(60);
      auto caller = RpcCaller::Make(options, bytes_, way.in_place);
      if (!caller.ok()) return caller.status();
      callers.push_back(*std::move(caller));
    }
    const absl::Status status = Measure(callers, grpc_echo->get());
    PinTo(-1);
    if (!status.ok()) return status;
    Report("raw_socket", floor_seconds_, rows);
    for (size_t way = 0; way < kEchoWays.size(); ++way) {
      Report(kEchoWays[way].name, echo_seconds_[way], rows);
    }
    for (size_t i = 0; i < ways.size(); ++i) {
      Report(ways[i].name, callers[i]->seconds, rows);
      Report(absl::StrCat(ways[i].name, "_in_server"), callers[i]->in_server_seconds, rows);
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Measure(const std::vector<std::unique_ptr<RpcCaller>>& callers,
                       GrpcEcho* grpc_echo) {
    Echo echo(bytes_, placement_.peer_cpu);
    bool echoed = true;
    for (int round = -1; round < round_count_; ++round) {
      if (round == 0) {  // the one before warmed up
        floor_seconds_.clear();
        for (std::vector<double>& seconds : echo_seconds_) seconds.clear();
        for (const auto& caller : callers) {
          caller->seconds.clear();
          caller->in_server_seconds.clear();
        }
      }
      for (int i = 0; i < call_count_; ++i) {
        floor_seconds_.push_back(Seconds([&] { echoed = echo.Call() && echoed; }));
      }
      for (size_t way = 0; way < kEchoWays.size(); ++way) {
        const EchoWay& echo_way = kEchoWays[way];
        for (int i = 0; i < call_count_; ++i) {
          echo_seconds_[way].push_back(Seconds([&] {
            echoed = (echo_way.is_stream ? grpc_echo->CallStream(echo_way.by_thread)
                                         : grpc_echo->CallUnary(echo_way.by_thread)) &&
                     echoed;
          }));
        }
      }
      for (const auto& caller : callers) {
        for (int i = 0; i < call_count_; ++i) {
          absl::Status status;
          caller->seconds.push_back(Seconds([&] { status = caller->Call(); }));
          if (!status.ok()) return status;
        }
      }
    }
    return echoed ? absl::OkStatus() : absl::UnavailableError("the floor gave way");
  }

  void Report(const std::string& name, const std::vector<double>& seconds, std::vector<Row>* rows) {
    for (const auto& [suffix, share] : {std::pair("p50", 0.5), std::pair("p99", 0.99)}) {
      const double value = Percentile(seconds, share);
      rows->push_back(
          {.workload = kWorkload,
           .case_name = absl::StrCat(placement_.name, "_", bytes_ >> 10, "KiB_", name, "_", suffix),
           .value = value * 1e6,
           .unit = "us",
           .baseline = "raw_socket",
           .ratio = value / Percentile(floor_seconds_, share),
           .error = 0.0});
    }
  }

  const Placement placement_;
  const size_t bytes_;
  const int round_count_;
  const int call_count_;
  std::vector<double> floor_seconds_;
  std::array<std::vector<double>, kEchoWays.size()> echo_seconds_;
};

}  // namespace

absl::Status RunRpcLatency(const BenchOptions& options, std::vector<Row>* rows) {
  std::vector<Placement> placements = {{"same", 0, 0}, {"free", -1, -1}};
  if (std::thread::hardware_concurrency() > 1)
    placements.insert(placements.begin() + 1, {"split", 0, 1});
  std::vector<size_t> sizes = {4 << 10, 64 << 10, 256 << 10, 1 << 20};
  if (options.quick) sizes = {4 << 10, 64 << 10};
  for (const Placement& placement : placements) {
    for (const size_t bytes : sizes) {
      const absl::Status status = Measurement(options, placement, bytes).Run(rows);
      PinTo(-1);
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace kvservice::bench
