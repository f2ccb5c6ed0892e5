// kvbench: speed, as ratios against baselines measured in the same run.
//
//     kvbench --workload=attend_cpu --json=FILE
//
// writes rows {workload, case, value, unit, baseline, ratio, error} and prints them as a table.
// Exit status 1 means that a result was wrong.

#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench.h"
#include "tests/bench/grpc_echo.h"

namespace kvservice::bench {
namespace {

struct Arguments {
  std::vector<std::string> workloads;
  std::string json_path;
  std::string machine;
  bool list = false;
  std::string grpc_echo;
  BenchOptions options;
};

std::string CheckSize(const std::string& text) {
  return ParseSize(text).has_value() ? "" : text + " is not sequences x tokens, as 8x32768";
}

void Parse(CLI::App* app, Arguments* arguments) {
  app->add_option("--workload", arguments->workloads, "Workloads to run (default: all)")
      ->delimiter(',');
  app->add_option("--json", arguments->json_path, "Write the rows here");
  app->add_option("--machine", arguments->machine, "Name of the machine (default: its CPU)");
  app->add_option("--threads", arguments->options.thread_count, "Threads (default: all CPUs)");
  app->add_option("--device", arguments->options.device, "Device to measure (default: cpu)");
  app->add_option("--trace", arguments->options.traces,
                  "Traces of real models (tests/eval/trace.py) that decode_e2e replays")
      ->delimiter(',');
  app->add_option("--trace-batches", arguments->options.trace_batches,
                  "Sequences of each of them, all alike (default: 1 8, on a GPU 1 8 32)")
      ->delimiter(',')
      ->check(CLI::Range(1, 256));
  app->add_option("--request-trace", arguments->options.request_traces,
                  "Traces of requests (Mooncake's) that eviction replays")
      ->delimiter(',');
  app->add_option("--transport", arguments->options.transports,
                  "How the calls of decode_e2e travel: some of auto, unary, stream and lane, which "
                  "take turns (default: auto)")
      ->delimiter(',')
      ->check(CLI::IsMember({"auto", "unary", "stream", "lane"}));
  app->add_option("--cases", arguments->options.cases,
                  "Cases of decode_e2e, as certified_deterministic or scan (default: all)")
      ->delimiter(',');
  app->add_option("--sizes", arguments->options.sizes,
                  "Sizes of the planted data of decode_e2e, as 8x32768: sequences x tokens "
                  "(default: its own)")
      ->delimiter(',')
      ->check(CheckSize);
  app->add_option("--steps", arguments->options.step_count, "Steps of each of these (default: 41)")
      ->check(CLI::Range(1, 100'000));
  app->add_option("--list-tokens", arguments->options.list_tokens,
                  "Tokens of fixed budgets there (default: 2048)");
  app->add_flag("--host-rows", arguments->options.host_rows,
                "decode_e2e: keys and values in the host's memory, sketches on the device");
  app->add_flag("--quick", arguments->options.quick, "Small sizes: checks results, not speed");
  app->add_option("--grpc-echo", arguments->grpc_echo)->group("");  // see grpc_echo.h
  app->add_flag("--list", arguments->list, "List the workloads");
}

std::string MachineName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) {
      return absl::StrFormat("%s, %d CPUs", line.substr(line.find(':') + 2),
                             std::thread::hardware_concurrency());
    }
  }
  return "unknown";
}

void PrintTable(const std::vector<Row>& rows) {
  absl::PrintF("%-12s %-44s %12s %-6s %8s  %-16s %9s\n", "workload", "case", "value", "unit",
               "ratio", "baseline", "error");
  for (const Row& row : rows) {
    absl::PrintF("%-12s %-44s %12.1f %-6s %7.2fx  %-16s %9.1e\n", row.workload, row.case_name,
                 row.value, row.unit, row.ratio, row.baseline, row.error);
  }
}

bool WriteJson(const Arguments& arguments, const std::vector<Row>& rows) {
  nlohmann::ordered_json document;
  document["machine"] = arguments.machine.empty() ? MachineName() : arguments.machine;
  document["device"] = arguments.options.device;
  document["quick"] = arguments.options.quick;
  document["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    document["rows"].push_back({{"workload", row.workload},
                                {"case", row.case_name},
                                {"value", row.value},
                                {"unit", row.unit},
                                {"baseline", row.baseline},
                                {"ratio", row.ratio},
                                {"error", row.error}});
  }
  std::ofstream file(arguments.json_path);
  file << document.dump(2) << "\n";
  return static_cast<bool>(file.flush());
}

int Run(const Arguments& arguments) {
  std::vector<Row> rows;
  bool right = true;
  bool known = arguments.workloads.empty();
  for (const Workload& workload : Workloads()) {
    const auto& asked = arguments.workloads;
    if (!asked.empty() && std::find(asked.begin(), asked.end(), workload.name) == asked.end()) {
      continue;
    }
    known = true;
    const absl::Status status = workload.run(arguments.options, &rows);
    if (status.ok()) continue;
    std::cerr << workload.name << ": " << status.message() << "\n";
    right = false;
  }
  if (!known) {
    std::cerr << "--workload: there is no such workload; see --list\n";
    return 2;
  }
  PrintTable(rows);
  if (!arguments.json_path.empty() && !WriteJson(arguments, rows)) {
    std::cerr << "--json: cannot write " << arguments.json_path << "\n";
    return 2;
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace kvservice::bench

int main(int argc, char** argv) {
  using namespace kvservice::bench;
  Arguments arguments;
  CLI::App app("Speed of KVService, as ratios against baselines measured in the same run");
  Parse(&app, &arguments);
  CLI11_PARSE(app, argc, argv);
  if (!arguments.grpc_echo.empty()) return ServeGrpcEcho(arguments.grpc_echo);
  if (arguments.list) {
    for (const Workload& workload : Workloads()) {
      std::cout << workload.name << "  " << workload.description << "\n";
    }
    return 0;
  }
  return Run(arguments);
}
