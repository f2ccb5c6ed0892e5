// The long forms of the campaigns.
//
//   kvstress power_cut --cuts=20000 --seed=1 [--row=FILE]
//   kvstress bit_flip --flips=10000 --seed=1 [--row=FILE]
//   kvstress io_fault --seed=1 [--row=FILE]
//   kvstress model_check --commands=5000000 --seed=1 [--row=FILE]
//   kvstress concurrent_history --operations=200000 --seed=1 [--row=FILE]
//   kvstress overload --rounds=5                              (these two run it too)
//   kvstress noisy_neighbour --rounds=5
//   kvstress restart --gib=10
//   kvstress sigkill --kills=2000 --seed=1 [--row=FILE]     (runs $KVSERVICE_BIN_DIR/kvservice)
//   kvstress soak --seconds=600
//
// Exit status: 0 nothing was wrong, 1 something was, 2 wrong usage. --row writes what happened as a
// JSON object, for tests/reliability.py.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/stress/bit_flip.h"
#include "tests/stress/campaign.h"
#include "tests/stress/concurrent_history.h"
#include "tests/stress/io_fault.h"
#include "tests/stress/model_check.h"
#include "tests/stress/overload.h"
#include "tests/stress/power_cut.h"
#include "tests/stress/restart.h"
#include "tests/stress/sigkill.h"
#include "tests/stress/soak.h"

namespace kvservice::testing {
namespace {

struct Flags {
  uint64_t seed = 1;
  uint64_t count = 0;
  std::string row;
  std::function<CampaignResult()> run;
  std::string test;
};

CLI::App* AddCampaign(CLI::App* app, Flags* flags, const std::string& name, const std::string& help,
                      const std::string& count_flag, uint64_t default_count,
                      std::function<CampaignResult()> run) {
  CLI::App* const command = app->add_subcommand(name, help);
  command->add_option("--seed", flags->seed, "Everything follows from it")->capture_default_str();
  // The campaigns share the place where it ends up, so the default is filled in when one is chosen.
  const CLI::Option* const count = command->add_option(count_flag, flags->count, "How many")
                                       ->default_str(std::to_string(default_count))
                                       ->check(CLI::NonNegativeNumber);
  command->add_option("--row", flags->row, "Write the result to this file")->type_name("FILE");
  command->callback([flags, name, count, default_count, run = std::move(run)] {
    if (count->empty()) flags->count = default_count;
    flags->test = name;
    flags->run = run;
  });
  return command;
}

int Report(const Flags& flags, const CampaignResult& result, double seconds) {
  const nlohmann::ordered_json row = {{"test", flags.test},          {"count", result.count},
                                      {"failures", result.failures}, {"seed", flags.seed},
                                      {"seconds", seconds},          {"checked", result.checked}};
  for (const std::string& failure : result.first_failures) std::cerr << failure << "\n";
  std::cout << row.dump() << std::endl;
  if (!flags.row.empty()) std::ofstream(flags.row) << row.dump(2) << "\n";
  return result.failures == 0 && result.count > 0 ? 0 : 1;
}

int Main(int argc, const char* const* argv) {
  Flags flags;
  CLI::App app("Breaks things under a server, and counts what that broke.", "kvstress");
  app.require_subcommand(1);
  AddCampaign(&app, &flags, "power_cut", "Cuts the power of the disk", "--cuts", 20'000, [&flags] {
    return RunPowerCuts({.seed = flags.seed, .cuts = flags.count, .ignore_log_syncs = false});
  });
  AddCampaign(&app, &flags, "bit_flip", "Damages files of closed stores", "--flips", 10'000,
              [&flags] { return RunBitFlips({.seed = flags.seed, .flips = flags.count}); });
  AddCampaign(&app, &flags, "io_fault", "Lets operations on files go wrong; 0 = each in each way",
              "--faults", 0,
              [&flags] { return RunIoFaults({.seed = flags.seed, .faults = flags.count}); });
  AddCampaign(&app, &flags, "model_check", "Compares an engine with a plain model", "--commands",
              1'000'000,
              [&flags] { return RunModelCheck({.seed = flags.seed, .commands = flags.count}); });
  AddCampaign(
      &app, &flags, "concurrent_history", "Threads use the same sequences", "--operations", 200'000,
      [&flags] { return RunConcurrentHistories({.seed = flags.seed, .operations = flags.count}); });
  AddCampaign(&app, &flags, "overload", "Offers a server ten times what it can do", "--rounds", 5,
              [&flags] { return RunOverload({.seed = flags.seed, .rounds = flags.count}); });
  AddCampaign(&app, &flags, "noisy_neighbour", "Offers too much beside another tenant", "--rounds",
              5,
              [&flags] { return RunNoisyNeighbour({.seed = flags.seed, .rounds = flags.count}); });
  AddCampaign(&app, &flags, "sigkill", "Kills server processes under load", "--kills", 2'000,
              [&flags] { return RunSigkills({.seed = flags.seed, .kills = flags.count}); });
  AddCampaign(&app, &flags, "soak", "Minutes of mixed load", "--seconds", 600,
              [&flags] { return RunSoak({.seed = flags.seed, .seconds = flags.count}); });
  AddCampaign(&app, &flags, "restart", "Starts an engine on a large store", "--gib", 10,
              [&flags] { return RunRestart({.seed = flags.seed, .gib = flags.count}); });
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const auto begin = std::chrono::steady_clock::now();
  const CampaignResult result = flags.run();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  return Report(flags, result, took.count());
}

}  // namespace
}  // namespace kvservice::testing

int main(int argc, char** argv) { return kvservice::testing::Main(argc, argv); }
