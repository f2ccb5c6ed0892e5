// Command lines and configuration files of the server: understood, or refused with one line.
//
// Input: the file, then after a zero byte the arguments, one a line.

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "kvservice/server/config.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

// No path of an input is opened: it could be one that never ends.
bool NamesFile(const std::string& argument) {
  return argument.rfind("--conf", 0) == 0 || argument.rfind("--policy", 0) == 0;
}

const std::string& FilePath() {
  static const auto* const kPath = [] {
    auto* const path = new std::string("/tmp/kvservice-config-fuzz-XXXXXX");
    close(mkstemp(path->data()));
    return path;
  }();
  return *kPath;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const size_t zero = text.find('\0');
  const std::string file = text.substr(0, zero);
  if (file.find("policy-file") != std::string::npos) return 0;
  std::ofstream(FilePath(), std::ios::trunc) << file;
  std::vector<std::string> arguments = {"kvservice", "--config=" + FilePath()};
  if (zero != std::string::npos) {
    size_t begin = zero + 1;
    while (begin < text.size()) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      // An argument of a program ends at a zero.
      const std::string argument = text.substr(begin, end - begin).c_str();
      if (!NamesFile(argument)) arguments.push_back(argument);
      begin = end + 1;
    }
  }
  std::vector<const char*> argv;
  argv.reserve(arguments.size());
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  const auto config = kvservice::ParseCommandLine(static_cast<int>(argv.size()), argv.data());
  if (config.ok()) {
    if (config->server.listen.empty() && config->text.empty()) std::abort();
    return 0;
  }
  const std::string message(config.status().message());
  if (message.empty() || message.find('\n') != std::string::npos) std::abort();
  return 0;
}
