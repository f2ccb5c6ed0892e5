// What the first call costs after nobody has called for two seconds, by every way: whatever sleeps,
// polls at intervals or has been given back by then shows in the longest of many such calls.
// Servers take turns, so that each has been idle for as long, and nothing of it was touched
// meanwhile.
//
// A call has 64 KiB there and back, and the engine next to nothing to do. "warm" is the call right
// behind the first one.

#include <poll.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/bench/rpc_caller.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "rpc_idle";
constexpr size_t kPayloadBytes = 64 << 10;
constexpr int kIdleMs = 2'000;

struct Way {
  const char* name;
  client::Transport transport;
  std::vector<double> first = {}, warm = {};
};

// A server of its own for each.
struct Idler {
  std::unique_ptr<ServerProcess> server;
  std::unique_ptr<RpcCaller> caller;
};

absl::StatusOr<Idler> MakeIdler(client::Transport transport) {
  auto server = ServerProcess::Start({"--device=cpu", "--threads=1", "--pool-bytes=64MiB"});
  if (!server.ok()) return server.status();
  client::ClientOptions options;
  options.endpoint = (*server)->endpoint();
  options.transport = transport;
  options.deadlines.data = std::chrono::seconds(60);
  auto caller = RpcCaller::Make(options, kPayloadBytes, false);
  if (!caller.ok()) return caller.status();
  return Idler{.server = *std::move(server), .caller = *std::move(caller)};
}

void Report(const std::string& name, std::vector<double> seconds, double baseline,
            std::vector<Row>* rows) {
  std::sort(seconds.begin(), seconds.end());
  const auto add = [&](const char* suffix, double value) {
    rows->push_back({.workload = kWorkload,
                     .case_name = absl::StrCat(name, "_", suffix),
                     .value = value * 1e6,
                     .unit = "us",
                     .baseline = "warm_p50",
                     .ratio = value / baseline});
  };
  add("p50", seconds[seconds.size() / 2]);
  add("p99", seconds[seconds.size() * 99 / 100]);
  add("max", seconds.back());
}

}  // namespace

absl::Status RunRpcIdle(const BenchOptions& options, std::vector<Row>* rows) {
  std::vector<Way> ways = {{"unary", client::Transport::kUnary},
                           {"stream", client::Transport::kStream},
                           {"lane", client::Transport::kLane}};
  const size_t server_count = options.quick ? 1 : 5;
  const int round_count = options.quick ? 2 : 40;
  const int idle_ms = options.quick ? 20 : kIdleMs;
  std::vector<std::pair<Way*, Idler>> idlers;
  for (size_t i = 0; i < server_count; ++i) {
    for (Way& way : ways) {
      auto idler = MakeIdler(way.transport);
      if (!idler.ok()) return idler.status();
      idlers.emplace_back(&way, *std::move(idler));
    }
  }
  for (int round = 0; round < round_count; ++round) {
    poll(nullptr, 0, idle_ms);
    // Whoever comes first finds the machine as idle as itself, and every way must.
    std::rotate(idlers.begin(), idlers.begin() + 1, idlers.end());
    for (auto& [way, idler] : idlers) {
      for (std::vector<double>* seconds : {&way->first, &way->warm}) {
        absl::Status status;
        seconds->push_back(Seconds([&, called = &idler] { status = called->caller->Call(); }));
        if (!status.ok()) return status;
      }
    }
  }
  for (Way& way : ways) {
    const double warm = Median(&way.warm);
    Report(absl::StrCat(way.name, "_first_of_", way.first.size()), way.first, warm, rows);
    Report(absl::StrCat(way.name, "_warm"), way.warm, warm, rows);
  }
  return absl::OkStatus();
}

}  // namespace kvservice::bench
