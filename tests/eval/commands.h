// The subcommands of kveval. Each Add... declares its options on a subcommand of `app` and returns
// a function that runs it (the exit status of the program is its result). `command` is the whole
// command line, for reports.

#ifndef KVSERVICE_TESTS_EVAL_COMMANDS_H_
#define KVSERVICE_TESTS_EVAL_COMMANDS_H_

#include <functional>
#include <string>

#include "CLI/CLI.hpp"

namespace kvservice::eval {

inline constexpr int kExitWrong = 1;   // A statement of a certificate was wrong.
inline constexpr int kExitCannot = 2;  // Something could not be read or written.

std::function<int()> AddCertificate(CLI::App* app, const std::string& command);
std::function<int()> AddQuality(CLI::App* app, const std::string& command);
std::function<int()> AddCalibrate(CLI::App* app, const std::string& command);

bool WriteFile(const std::string& path, const std::string& text);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_COMMANDS_H_
