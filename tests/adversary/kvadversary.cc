// kvadversary: attacks certificates with hostile caches and counts how often they are wrong.
//
//     kvadversary --cases=10000000 --device=cpu --json=FILE
//
// judges that many head-certificates, or as many as --seconds allows, and prints violations, misses
// and tightness; the JSON also says of what kinds of attack they were. Exit status 1:
// a deterministic bound was wrong, replies contradicted themselves, a stated probability was
// exceeded (exact binomial test), or bounds were looser than --slack-max-median. Every failure
// prints the flags that repeat it alone.
//
// On a GPU every look at a sample is a round trip, some 16 for each sampled certificate, and
// nothing else costs as much: --sampled=0.01 is for a campaign about bounds that always hold, the
// default for one about stated probabilities.

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"
#include "tests/adversary/attack.h"
#include "tests/adversary/coverage_runs.h"
#include "tests/adversary/endpoint_attack.h"
#include "tests/adversary/instruction_set.h"
#include "tests/adversary/shares.h"
#include "tests/adversary/tally.h"

namespace kvservice::adversary {
namespace {

struct Arguments {
  uint64_t certificates = 200'000;
  double seconds = std::numeric_limits<double>::infinity();
  uint64_t seed = 1;
  uint64_t case_seed = 0;
  std::string device = "all";
  std::string endpoint;
  std::string json_path;
  std::string target;
  uint32_t thread_count = 0;
  double sampled = 1.0;
  // On tame cases bounds of 1 have a median above 5 nats, sound ones one of about 1.
  double slack_max_median = 2.0;
  bool coverage = false;
};

void Parse(CLI::App* app, Arguments* arguments) {
  app->add_option("--cases", arguments->certificates, "Head-certificates to judge, at least");
  app->add_option("--seconds", arguments->seconds, "Begin no case after so many seconds")
      ->check(CLI::PositiveNumber);
  app->add_option("--seed", arguments->seed, "Seed of the whole run");
  app->add_option("--case-seed", arguments->case_seed, "Run the case of this seed alone");
  app->add_option("--device", arguments->device, "reference, cpu, cuda, auto or all")
      ->check(CLI::IsMember({"reference", "cpu", "cuda", "auto", "all"}));
  app->add_option("--endpoint", arguments->endpoint, "Attack this server, not a device");
  app->add_option("--threads", arguments->thread_count, "Threads (default: one per CPU)");
  app->add_option("--sampled", arguments->sampled,
                  "Share of the plans for CONFIDENCE that stay; the others ask for DETERMINISTIC")
      ->check(CLI::Range(0.0, 1.0));
  app->add_option("--json", arguments->json_path, "Write the counts here");
  app->add_option("--slack-max-median", arguments->slack_max_median,
                  "Largest median of ln(bound / truth) on tame cases, in nats");
  app->add_option("--target", arguments->target, "Instruction set, as Highway names it");
  app->add_flag("--coverage", arguments->coverage,
                "Repeat sampled certificates on fixed hostile populations");
}

std::vector<std::string> DevicesOf(const std::string& name) {
  if (name == "all") return {"reference", "cpu"};
  return {name};
}

uint32_t ThreadsOf(const Arguments& arguments) {
  if (arguments.thread_count > 0) return arguments.thread_count;
  return std::max(1U, std::thread::hardware_concurrency());
}

absl::Status RunDevices(const Arguments& arguments, Tally* tally) {
  AttackOptions options;
  options.devices = DevicesOf(arguments.device);
  options.sampled = arguments.sampled;
  std::vector<std::unique_ptr<Attacker>> attackers;
  const bool one = arguments.case_seed != 0;
  const uint32_t thread_count = one ? 1 : ThreadsOf(arguments);
  for (uint32_t i = 0; i < thread_count; ++i) {
    absl::StatusOr<std::unique_ptr<Attacker>> attacker = Attacker::New(options);
    if (!attacker.ok()) return attacker.status();
    attackers.push_back(std::move(attacker).value());
  }
  if (one) {
    attackers[0]->RunCase(arguments.case_seed, tally);
    return absl::OkStatus();
  }
  RunUntil(
      {.certificates = arguments.certificates,
       .seconds = arguments.seconds,
       .thread_count = thread_count},
      [&](uint64_t index, uint32_t thread, Tally* counts) {
        attackers[thread]->RunCase(SeedOf(arguments.seed, index), counts);
      },
      tally);
  return absl::OkStatus();
}

absl::Status RunEndpoint(const Arguments& arguments, Tally* tally) {
  EndpointOptions options;
  options.endpoint = arguments.endpoint;
  options.certificates = arguments.certificates;
  options.seconds = arguments.seconds;
  options.seed = arguments.seed;
  options.case_seed = arguments.case_seed;
  options.thread_count = ThreadsOf(arguments);
  return AttackEndpoint(options, tally);
}

absl::Status RunCoverage(const Arguments& arguments, Tally* tally) {
  CoverageOptions options;
  options.devices = DevicesOf(arguments.device);
  options.certificates = arguments.certificates;
  options.seconds = arguments.seconds;
  options.seed = arguments.seed;
  options.thread_count = ThreadsOf(arguments);
  return MeasureCoverage(options, tally);
}

nlohmann::ordered_json SlackJson(const SlackCounts& slack) {
  if (slack.count() == 0) return nullptr;
  return {{"count", slack.count()},
          {"min", slack.smallest()},
          {"median", slack.At(0.5)},
          {"p95", slack.At(0.95)},
          {"max", slack.largest()}};
}

nlohmann::ordered_json SampledJson(const Tally& tally) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const auto& [eta, counts] : tally.sampled) {
    rows.push_back(
        {{"failure_probability", eta},
         {"mass_count", counts.mass_count},
         {"mass_misses", counts.mass_misses},
         {"mass_p_value", MissProbability(counts.mass_count, counts.mass_misses, eta)},
         {"output_count", counts.output_count},
         {"output_misses", counts.output_misses},
         {"output_p_value", MissProbability(counts.output_count, counts.output_misses, eta)}});
  }
  return rows;
}

// By what they are sorted by, then by kind.
nlohmann::ordered_json SharesJson(const Shares& shares) {
  nlohmann::ordered_json axes;
  for (size_t i = 0; i < kAxes; ++i) {
    const auto axis = static_cast<Axis>(i);
    for (size_t kind = 0; kind < Shares::kKindsMax; ++kind) {
      if (const uint64_t count = shares.Of(axis, kind); count > 0) {
        axes[Name(axis)][Shares::KindName(axis, kind)] = count;
      }
    }
  }
  return axes;
}

bool WriteJson(const Arguments& arguments, const Tally& tally, double seconds) {
  nlohmann::ordered_json document;
  document["cases"] = tally.certificates;
  document["violations"] = tally.violations;
  document["contradictions"] = tally.contradictions;
  document["misses"] = tally.misses();
  document["expected_misses"] = tally.expected_misses();
  document["slack_median"] = tally.slack.At(0.5);
  document["slack_p95"] = tally.slack.At(0.95);
  document["slack_max"] = tally.slack.count() > 0 ? tally.slack.largest() : 0.0;
  document["slack_tame"] = SlackJson(tally.slack_tame);
  document["slack_tame_if_one"] = SlackJson(tally.slack_tame_of_one);
  document["slack_output"] = SlackJson(tally.output_slack);
  document["levels"] = {{"none", tally.levels[0]},
                        {"confidence", tally.levels[1]},
                        {"deterministic", tally.levels[2]},
                        {"exact", tally.levels[3]}};
  document["sampled"] = SampledJson(tally);
  document["attacks"] = SharesJson(tally.shares);
  document["caches"] = tally.caches;
  document["calls"] = tally.calls;
  document["rows"] = tally.rows;
  document["climbs"] = tally.climbs;
  document["seed"] = arguments.seed;
  document["sampled_share"] = arguments.sampled;
  document["device"] = arguments.endpoint.empty() ? arguments.device : arguments.endpoint;
  document["seconds"] = seconds;
  std::ofstream file(arguments.json_path);
  file << document.dump(2) << "\n";
  return static_cast<bool>(file.flush());
}

// A few cases, and fixed populations, say nothing about tightness.
bool TightEnough(const Arguments& arguments, const Tally& tally) {
  constexpr uint64_t kCountMin = 500;
  if (arguments.coverage || tally.slack_tame.count() < kCountMin) return true;
  if (tally.slack_tame.At(0.5) <= arguments.slack_max_median) return true;
  std::cout << "FAILED too loose: median " << tally.slack_tame.At(0.5) << " nats on tame cases\n";
  return false;
}

int Run(const Arguments& arguments) {
  const auto began = std::chrono::steady_clock::now();
  Tally tally;
  const absl::Status status = arguments.coverage            ? RunCoverage(arguments, &tally)
                              : !arguments.endpoint.empty() ? RunEndpoint(arguments, &tally)
                                                            : RunDevices(arguments, &tally);
  if (!status.ok()) {
    std::cerr << status.message() << "\n";
    return 2;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  std::cout << Summary(tally) << "seed " << arguments.seed << ", " << seconds.count() << " s\n";
  if (tally.least_miss_probability() < kSignificance) {
    std::cout << "FAILED more misses than the stated probabilities allow\n";
  }
  const bool tight = TightEnough(arguments, tally);
  if (!arguments.json_path.empty() && !WriteJson(arguments, tally, seconds.count())) {
    std::cerr << "--json: cannot write " << arguments.json_path << "\n";
    return 2;
  }
  return tally.sound() && tight ? 0 : 1;
}

}  // namespace
}  // namespace kvservice::adversary

int main(int argc, char** argv) {
  using namespace kvservice::adversary;
  Arguments arguments;
  CLI::App app("Attacks the certificates of KVService and counts how often they are wrong");
  Parse(&app, &arguments);
  CLI11_PARSE(app, argc, argv);
  if (!arguments.target.empty() && !UseInstructionSet(arguments.target)) {
    std::cerr << "--target: this machine or build has no " << arguments.target << "; there is "
              << absl::StrJoin(InstructionSets(), ", ") << "\n";
    return 2;
  }
  return Run(arguments);
}
