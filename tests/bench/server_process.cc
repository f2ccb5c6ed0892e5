#include "tests/bench/server_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvservice::bench {
namespace {

constexpr auto kStartTimeMax = std::chrono::minutes(1);
constexpr auto kPollTime = std::chrono::milliseconds(20);

absl::StatusOr<std::string> ProgramPath() {
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::UnavailableError("cannot tell where this program lies");
  return (self.parent_path() / "kvservice").string();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServerProcess>> ServerProcess::Start(
    std::vector<std::string> arguments) {
  const absl::StatusOr<std::string> path = ProgramPath();
  if (!path.ok()) return path.status();
  std::string folder = (std::filesystem::temp_directory_path() / "kvbench-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) return absl::UnavailableError("no temporary folder");
  const std::string ready = folder + "/ready";
  arguments.insert(arguments.begin(),
                   {"kvservice", absl::StrCat("--listen=unix:", folder, "/kvservice.sock"),
                    "--admin-listen=none", "--log-level=warn", "--ready-file=" + ready});
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  // Standard output is this program's table.
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = 0;
  const int code = posix_spawn(&pid, path->c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (code != 0) {
    std::filesystem::remove_all(folder);
    return absl::UnavailableError(absl::StrCat("cannot start ", *path));
  }
  std::unique_ptr<ServerProcess> server(new ServerProcess(pid, folder));
  const auto deadline = std::chrono::steady_clock::now() + kStartTimeMax;
  while (!std::filesystem::exists(ready)) {
    if (waitpid(pid, nullptr, WNOHANG) == pid) return absl::UnavailableError("the server ended");
    if (std::chrono::steady_clock::now() > deadline) {
      return absl::UnavailableError("the server did not become ready");
    }
    std::this_thread::sleep_for(kPollTime);
  }
  return server;
}

ServerProcess::~ServerProcess() {
  kill(pid_, SIGTERM);
  waitpid(pid_, nullptr, 0);
  std::error_code error;
  std::filesystem::remove_all(folder_, error);
}

}  // namespace kvservice::bench
