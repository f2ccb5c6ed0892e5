#include "client/kvctl/completion.h"

#include <CLI/CLI.hpp>
#include <algorithm>

namespace kvservice::client {
namespace {

using Words = std::vector<std::string>;

// Flags whose values are known beforehand.
const std::vector<std::pair<std::string, Words>>& KnownValues() {
  static const std::vector<std::pair<std::string, Words>> kKnown = {
      {"output", {"table", "json"}},
      {"service", {"kvservice.v1.AttentionService", "kvservice.liveness"}},
      {"policy", {"dense", "certified", "cis", "cpe", "scan"}}};
  return kKnown;
}

// All commands that led to where we are, the outermost first.
using Path = std::vector<const CLI::App*>;

const CLI::App* CommandOf(const CLI::App& app, const std::string& word) {
  for (const CLI::App* command : app.get_subcommands(nullptr)) {
    if (command->check_name(word)) return command;
  }
  return nullptr;
}

// The flag that this word is, of any command of the path, as flags fall through.
const CLI::Option* FlagOf(const Path& path, const std::string& word) {
  for (const CLI::App* app : path) {
    for (const CLI::Option* option : app->get_options()) {
      if (!option->get_positional() && option->check_name(word)) return option;
    }
  }
  return nullptr;
}

bool TakesValue(const CLI::Option* option) { return option->get_expected_max() > 0; }

Words ValuesOf(const CLI::Option& option) {
  for (const auto& [name, values] : KnownValues()) {
    if (option.check_lname(name)) return values;
  }
  return {};
}

Words FlagsOf(const Path& path) {
  Words flags;
  for (auto app = path.rbegin(); app != path.rend(); ++app) {
    for (const CLI::Option* option : (*app)->get_options()) {
      for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
    }
  }
  return flags;
}

// Where the words before the unfinished one lead.
struct Place {
  Path path;
  // The unfinished word is its value.
  const CLI::Option* flag = nullptr;
  size_t positional_count = 0;
};

Place PlaceOf(const CLI::App& app, const Words& words) {
  Place place{.path = {&app}};
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    if (place.flag != nullptr) {
      place.flag = nullptr;
    } else if (words[i].substr(0, 1) == "-") {
      const CLI::Option* const flag = FlagOf(place.path, words[i]);
      if (flag != nullptr && TakesValue(flag)) place.flag = flag;
    } else if (const CLI::App* command = CommandOf(*place.path.back(), words[i])) {
      place.path.push_back(command);
    } else {
      ++place.positional_count;
    }
  }
  return place;
}

Words Candidates(const Place& place, const std::string& prefix, const NamesOnServer& names) {
  if (place.flag != nullptr) return ValuesOf(*place.flag);
  if (prefix.substr(0, 1) == "-") return FlagsOf(place.path);
  Words candidates;
  for (const CLI::App* command : place.path.back()->get_subcommands(nullptr)) {
    candidates.push_back(command->get_name());
  }
  size_t index = 0;
  for (const CLI::Option* option : place.path.back()->get_options()) {
    if (!option->get_positional() || index++ != place.positional_count) continue;
    const Words known = names(option->get_name());
    candidates.insert(candidates.end(), known.begin(), known.end());
  }
  return candidates;
}

}  // namespace

std::string BashCompletion() {
  return R"(# bash completion of kvctl:  source <(kvctl completion bash)
_kvctl() {
  local IFS=$'\n'
  COMPREPLY=($("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -F _kvctl kvctl
)";
}

Words Complete(const CLI::App& app, const Words& words, const NamesOnServer& names) {
  if (words.empty()) return {};
  const std::string& prefix = words.back();
  Words matching = Candidates(PlaceOf(app, words), prefix, names);
  std::erase_if(matching, [&](const std::string& word) { return !word.starts_with(prefix); });
  return matching;
}

}  // namespace kvservice::client
