#include "tests/bench/server_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvservice::bench {
namespace {

// Between two lines of a server that starts.
constexpr int kStartMsMax = 60'000;

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
  arguments.insert(arguments.begin(),
                   {"kvservice", absl::StrCat("--listen=unix:", folder, "/kvservice.sock"),
                    "--admin-listen=none", "--log-level=warn"});
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::array<int, 2> output = {-1, -1};
  if (pipe2(output.data(), O_CLOEXEC) != 0) return absl::UnavailableError("no pipe");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, output[1], STDOUT_FILENO);
  pid_t pid = 0;
  const int code = posix_spawn(&pid, path->c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(output[1]);
  if (code != 0) {
    close(output[0]);
    std::filesystem::remove_all(folder);
    return absl::UnavailableError(absl::StrCat("cannot start ", *path));
  }
  std::unique_ptr<ServerProcess> server(new ServerProcess(pid, output[0], folder));
  if (!server->IsReady()) return absl::UnavailableError("the server did not become ready");
  return server;
}

bool ServerProcess::IsReady() const {
  std::string text;
  while (text.find("ready\n") == std::string::npos) {
    pollfd waited{.fd = output_, .events = POLLIN, .revents = 0};
    if (poll(&waited, 1, kStartMsMax) <= 0) return false;
    std::array<char, 4096> buffer;
    const ssize_t got = read(output_, buffer.data(), buffer.size());
    if (got <= 0) return false;
    text.append(buffer.data(), static_cast<size_t>(got));
  }
  return true;
}

ServerProcess::~ServerProcess() {
  if (pid_ > 0) kill(pid_, SIGTERM);
  waitpid(pid_, nullptr, 0);
  close(output_);
  std::error_code error;
  std::filesystem::remove_all(folder_, error);
}

}  // namespace kvservice::bench
