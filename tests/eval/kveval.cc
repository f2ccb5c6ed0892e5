// kveval: quality, measured on real models and real text.
//
//     kveval certificate   how tight certificates are on traces of attention, and what they cost
//     kveval quality       selectors and published methods in a closed loop
//     kveval calibrate     writes a policy file for a model
//
// Exit status 1: a statement of a certificate was wrong; 2: something could not be read or written.

#include <functional>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "tests/eval/commands.h"

int main(int argc, char** argv) {
  std::string command = "build/bin/kveval";
  for (int i = 1; i < argc; ++i) command += " " + std::string(argv[i]);
  CLI::App app("Quality of KVService on real models and real text");
  app.require_subcommand(1);
  std::vector<std::pair<CLI::App*, std::function<int()>>> commands;
  using Add = std::function<int()> (*)(CLI::App*, const std::string&);
  const std::pair<const char*, Add> known[] = {{"certificate", kvservice::eval::AddCertificate},
                                               {"quality", kvservice::eval::AddQuality},
                                               {"calibrate", kvservice::eval::AddCalibrate}};
  for (const auto& [name, add] : known) {
    CLI::App* subcommand = app.add_subcommand(name);
    commands.emplace_back(subcommand, add(subcommand, command));
  }
  CLI11_PARSE(app, argc, argv);
  for (const auto& [subcommand, run] : commands) {
    if (subcommand->parsed()) return run();
  }
  return kvservice::eval::kExitCannot;
}
