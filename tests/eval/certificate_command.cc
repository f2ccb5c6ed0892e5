// kveval certificate: takes all traces in build/traces, or those that --traces names;
// tests/eval/trace.py makes them. Tables of a trace are learnt from the next one of the same model
// and length.

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "tests/eval/certificate_study.h"
#include "tests/eval/commands.h"
#include "tests/eval/report.h"

namespace kvservice::eval {
namespace {

struct Arguments {
  std::vector<std::string> traces;
  std::string json_path;
  std::string markdown_path;
  std::string command;
  std::string only;
  StudyOptions options;
};

// The next trace of the same model and length, cyclically; the trace itself if it is alone.
const TraceHeader& Other(const std::vector<TraceHeader>& traces, size_t index) {
  for (size_t i = 1; i < traces.size(); ++i) {
    const TraceHeader& other = traces[(index + i) % traces.size()];
    if (other.model == traces[index].model && other.token_count == traces[index].token_count) {
      return other;
    }
  }
  return traces[index];
}

// Files of the folder that traces are made in, by name.
std::vector<std::string> FindTraces() {
  std::vector<std::string> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("build/traces", error)) {
    if (entry.path().extension() == ".kvtrace") found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

int Run(Arguments arguments) {
  if (arguments.traces.empty()) arguments.traces = FindTraces();
  if (arguments.traces.empty()) {
    std::cerr << "--traces: none in build/traces; tests/eval/trace.py --all makes them\n";
    return kExitCannot;
  }
  arguments.options.tightness = arguments.only != "costs";
  arguments.options.costs = arguments.only != "tightness";
  std::vector<TraceHeader> traces;
  for (const std::string& path : arguments.traces) {
    auto trace = ReadTraceHeader(path);
    if (!trace.ok()) {
      std::cerr << "--traces: " << path << ": " << trace.status().message() << "\n";
      return kExitCannot;
    }
    traces.push_back(std::move(*trace));
  }
  std::vector<TraceResult> results;
  for (size_t i = 0; i < traces.size(); ++i) {
    auto result = StudyTrace(arguments.options, traces[i], Other(traces, i));
    if (!result.ok()) {
      std::cerr << traces[i].name << ": " << result.status().message() << "\n";
      return kExitCannot;
    }
    std::cerr << traces[i].name << ": " << result->certificates << " certificates, wrong "
              << result->wrong + result->wrong_sampled << "\n";
    results.push_back(std::move(*result));
  }
  const nlohmann::ordered_json report = MakeReport(results, arguments.options.device);
  const std::string page = MakePage(report, arguments.command);
  std::cout << page;
  if ((!arguments.json_path.empty() && !WriteFile(arguments.json_path, MakeJsonText(report))) ||
      (!arguments.markdown_path.empty() && !WriteFile(arguments.markdown_path, page))) {
    std::cerr << "--json or --markdown: cannot write\n";
    return kExitCannot;
  }
  return report["wrong_statements"].get<uint64_t>() == 0 ? 0 : kExitWrong;
}

}  // namespace

bool WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  return static_cast<bool>(file.flush());
}

std::function<int()> AddCertificate(CLI::App* app, const std::string& command) {
  const auto arguments = std::make_shared<Arguments>();
  arguments->command = command;
  app->description("How tight certificates are on traces of attention, and what they cost");
  app->add_option("--traces", arguments->traces, "Files (default: all in build/traces)")
      ->delimiter(',');
  app->add_option("--json", arguments->json_path, "Write the results here");
  app->add_option("--markdown", arguments->markdown_path, "Write them as a page here");
  app->add_option("--device", arguments->options.device, "Device that answers (default: cpu)");
  app->add_option("--threads", arguments->options.thread_count, "Layers at a time (default: 1)")
      ->check(CLI::Range(1, 256));
  app->add_option("--queries", arguments->options.query_count, "Queries per trace (0 = all)");
  app->add_option("--only", arguments->only, "tightness or costs (default: both)")
      ->check(CLI::IsMember({"tightness", "costs"}));
  return [arguments] { return Run(*arguments); };
}

}  // namespace kvservice::eval
