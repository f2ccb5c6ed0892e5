// What a shell asks kvctl when somebody presses tab. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_COMPLETION_H_
#define KVSERVICE_CLIENT_KVCTL_COMPLETION_H_

#include <CLI/App.hpp>
#include <functional>
#include <string>
#include <vector>

namespace kvservice::client {

// A hidden first word of kvctl: the words of a command line follow, the last one unfinished.
inline constexpr char kCompleteWord[] = "__complete";

// To be sourced by bash; it asks kvctl for everything.
std::string BashCompletion();

// Names that a server knows, for the values of a positional argument of this name ("id", "name");
// empty if it does not answer soon.
using NamesOnServer = std::function<std::vector<std::string>(const std::string& positional)>;

// What may stand in place of the last of `words`, in the order of the help: commands, flags of the
// command so far, values of the flag before, names.
std::vector<std::string> Complete(const CLI::App& app, const std::vector<std::string>& words,
                                  const NamesOnServer& names);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_COMPLETION_H_
