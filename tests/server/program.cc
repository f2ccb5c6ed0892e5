#include "tests/server/program.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <utility>

namespace kvservice::testing {
namespace {

struct Pipe {
  FileDescriptor read_end;
  FileDescriptor write_end;
};

Pipe OpenPipe() {
  std::array<int, 2> ends{};
  EXPECT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
  return {FileDescriptor(ends[0]), FileDescriptor(ends[1])};
}

std::string PathOf(const std::string& name) {
  const char* const folder = std::getenv("KVSERVICE_BIN_DIR");
  EXPECT_NE(folder, nullptr) << "the environment must say where the programs are";
  return std::string(folder == nullptr ? "." : folder) + "/" + name;
}

// False at the end of the stream.
bool ReadSome(const FileDescriptor& source, std::string* text) {
  std::array<char, 4096> buffer;
  const ssize_t got = read(source.get(), buffer.data(), buffer.size());
  if (got <= 0) return false;
  text->append(buffer.data(), static_cast<size_t>(got));
  return true;
}

}  // namespace

Program::Program(const std::string& name, std::vector<std::string> arguments) {
  Pipe output = OpenPipe();
  Pipe errors = OpenPipe();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, output.write_end.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, errors.write_end.get(), STDERR_FILENO);
  const std::string path = PathOf(name);
  arguments.insert(arguments.begin(), name);
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const int failed = posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ);
  EXPECT_EQ(failed, 0) << path;
  if (failed != 0) pid_ = -1;
  posix_spawn_file_actions_destroy(&actions);
  output_pipe_ = std::move(output.read_end);
  error_pipe_ = std::move(errors.read_end);
}

Program::~Program() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

bool Program::WaitForLine(const std::string& line) {
  while (output_.find(line + "\n") == std::string::npos) {
    if (!ReadSome(output_pipe_, &output_)) return false;
  }
  return true;
}

bool Program::ReadMore() {
  pollfd ready{.fd = output_pipe_.get(), .events = POLLIN, .revents = 0};
  return poll(&ready, 1, 0) <= 0 || ReadSome(output_pipe_, &output_);
}

// To -1 would be to every process that there is.
void Program::Signal(int signal) const {
  EXPECT_GT(pid_, 0) << "the program did not start, or has ended";
  if (pid_ > 0) kill(pid_, signal);
}

int Program::Wait() {
  while (ReadSome(output_pipe_, &output_)) {
  }
  while (ReadSome(error_pipe_, &errors_)) {
  }
  if (pid_ <= 0) return -1;
  int status = 0;
  waitpid(std::exchange(pid_, -1), &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace kvservice::testing
