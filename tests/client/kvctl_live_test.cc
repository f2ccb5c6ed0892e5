// kvctl with a person in front of it, and every exit status that a script may meet.

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/client/kvctl_run.h"
#include "tests/client/scripted_server.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::Not;
using Json = nlohmann::json;

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

class KvctlLiveTest : public ::testing::Test {
 protected:
  // Without the program these would wait for what it shows.
  void SetUp() override { ASSERT_NE(std::getenv("KVSERVICE_BIN_DIR"), nullptr); }
  Outcome Run(const std::string& arguments) const {
    return RunKvctl(EnvironmentOf(served_), arguments);
  }
  std::vector<std::string> Endpoints() const {
    return {"--endpoint", "unix:" + served_.folder() + "/data", "--admin-endpoint",
            "unix:" + served_.folder() + "/admin"};
  }
  // On a terminal of its own, where somebody types `typed`. Returns the exit status.
  int RunAtTerminal(std::vector<std::string> arguments, const std::string& typed,
                    std::string* shown) const;

  const ServedEngine served_;
};

int KvctlLiveTest::RunAtTerminal(std::vector<std::string> arguments, const std::string& typed,
                                 std::string* shown) const {
  const std::string path = std::string(std::getenv("KVSERVICE_BIN_DIR")) + "/kvctl";
  const std::vector<std::string> endpoints = Endpoints();
  arguments.insert(arguments.end(), endpoints.begin(), endpoints.end());
  arguments.insert(arguments.begin(), "kvctl");
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  int terminal = -1;
  const pid_t pid = forkpty(&terminal, nullptr, nullptr, nullptr);
  if (pid == 0) {
    execv(path.c_str(), argv.data());
    _exit(127);
  }
  EXPECT_GT(pid, 0);
  EXPECT_EQ(write(terminal, typed.data(), typed.size()), static_cast<ssize_t>(typed.size()));
  char buffer[4096];
  for (ssize_t count = 0; (count = read(terminal, buffer, sizeof(buffer))) > 0;) {
    shown->append(buffer, static_cast<size_t>(count));
  }
  int status = 0;
  waitpid(pid, &status, 0);
  close(terminal);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(KvctlLiveTest, SomebodyAtATerminalTypesTheName) {
  const std::string id = MakeSequence(served_);
  std::string shown;
  EXPECT_EQ(RunAtTerminal({"sequence", "drop", id}, "yes\n", &shown), 2);
  EXPECT_THAT(shown, HasSubstr("Type " + id + " to go on"));
  EXPECT_THAT(shown, HasSubstr("nothing was done"));
  EXPECT_EQ(served_.engine()->Stats().sequences, 1U);
  shown.clear();
  EXPECT_EQ(RunAtTerminal({"sequence", "drop", id}, id + "\n", &shown), 0);
  EXPECT_THAT(shown, HasSubstr("dropped " + id));
  EXPECT_EQ(served_.engine()->Stats().sequences, 0U);
}

TEST_F(KvctlLiveTest, SomebodyAtATerminalIsAskedBeforeATenantIsBeyondItsMaximum) {
  MakeSequence(served_);
  const std::vector<std::string> set = {"quota", "set", "default", "--pool-max", "1KiB"};
  std::string shown;
  EXPECT_EQ(RunAtTerminal(set, "yes\n", &shown), 2);
  EXPECT_THAT(shown, HasSubstr("more than 1.0 KiB"));
  EXPECT_THAT(shown, HasSubstr("Type default to go on"));
  EXPECT_THAT(Run("quota list").out, Not(HasSubstr("1.0 KiB")));
  EXPECT_EQ(RunAtTerminal(set, "default\n", &shown), 0);
  EXPECT_THAT(Run("quota list").out, HasSubstr("1.0 KiB"));
  EXPECT_EQ(Run("quota set default --pool-max none").exit, 0) << "that one is never beyond";
  EXPECT_THAT(Lines(Run("__complete quota set ''").out), Contains("default"));
}

TEST_F(KvctlLiveTest, InterruptedIs130) {
  for (const char* const verb : {"top", "watch"}) {
    MakeSequence(served_);
    std::vector<std::string> arguments = Endpoints();
    arguments.insert(arguments.end(), {"-o", "json", "--watch", "60m", verb});
    Program kvctl("kvctl", arguments);
    // The first sample.
    ASSERT_TRUE(Eventually([&] { return kvctl.ReadMore() && !kvctl.output().empty(); }));
    kvctl.Signal(SIGINT);
    EXPECT_EQ(kvctl.Wait(), 130) << verb;
    EXPECT_EQ(kvctl.errors(), "");
  }
}

TEST_F(KvctlLiveTest, TopCountsBetweenTwoSamples) {
  const std::string id = MakeSequence(served_);
  const std::vector<std::string> lines =
      Lines(Run("top -o json --watch 1ms --watch-count 2 --sequences 1").out);
  ASSERT_EQ(lines.size(), 2U) << "a line for each sample";
  for (const std::string& line : lines) {
    const Json sample = Json::parse(line);
    EXPECT_EQ(sample["schema_version"], 1);
    EXPECT_EQ(sample["sequence_count"], 1);
    ASSERT_EQ(sample["sequences"].size(), 1U);
    EXPECT_EQ(sample["sequences"][0]["id"], id);
  }
  // Nothing was attended in between, and the first sample has it all.
  EXPECT_GT(Json::parse(lines[0])["tokens_visible"], 0);
  EXPECT_EQ(Json::parse(lines[1])["tokens_visible"], 0);
}

TEST_F(KvctlLiveTest, WatchTellsWhatComesAndGoes) {
  const std::string first = MakeSequence(served_);
  std::vector<std::string> arguments = Endpoints();
  arguments.insert(arguments.end(), {"--watch", "10ms", "watch"});
  Program kvctl("kvctl", arguments);
  const auto tells = [&](const std::string& text) {
    return Eventually([&] {
      kvctl.ReadMore();
      return kvctl.output().find(text) != std::string::npos;
    });
  };
  EXPECT_TRUE(tells("created  " + first + "  default  small  generation 1  100 tokens\n"));
  EXPECT_EQ(Run("sequence drop --yes " + first).exit, 0);
  EXPECT_TRUE(tells("gone  " + first));
  const std::string second = MakeSequence(served_);
  EXPECT_TRUE(tells("created  " + second));
  kvctl.Signal(SIGINT);
  EXPECT_EQ(kvctl.Wait(), 130);
}

TEST_F(KvctlLiveTest, AServerThatDrainsIsUnhealthy) {
  Brake brake;
  ServedEngineOptions options;
  options.device = brake.On(*NewDevice("reference", {}));
  ServedEngine served(std::move(options));
  MakeSequence(served);
  const auto healthy = [&] {
    return RunKvctl("KVCTL_ENDPOINT='unix:" + served.folder() + "/admin'", "health");
  };
  EXPECT_EQ(healthy().exit, 0);
  // A call that does not end keeps the drain waiting.
  brake.Set(true);
  const int calls_before = brake.call_count();
  const auto attention = v1::AttentionService::NewStub(served.Connect());
  v1::SequenceHandle handle;
  std::thread caller([&] {
    v1::CreateRequest create;
    create.set_model(kModel);
    v1::CreateResponse created;
    const auto sequences = v1::SequenceService::NewStub(served.Connect());
    ASSERT_TRUE(sequences->Create(NewContext().get(), create, &created).ok());
    v1::AttendResponse response;
    const v1::AttendRequest request =
        MakeAttend(served.model(), created.sequence().handle(), 0, 0, {1});
    EXPECT_TRUE(attention->Attend(NewContext().get(), request, &response).ok());
  });
  EXPECT_TRUE(Eventually([&] { return brake.call_count() > calls_before; }));
  std::thread drain([&] { served.server()->Drain(60'000); });
  EXPECT_TRUE(Eventually([&] { return healthy().exit == 7; }));
  EXPECT_EQ(healthy().out, "not_serving\n");
  brake.Set(false);
  caller.join();
  drain.join();
}

// A socket that takes connections and says nothing.
TEST_F(KvctlLiveTest, ASilentServerIsOutOfTime) {
  const TemporaryFolder folder;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = folder.path() + "/silent";
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  const FileDescriptor listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(listener.get(), 8), 0);
  const Outcome outcome = RunKvctl("KVCTL_ENDPOINT='unix:" + path + "'", "--timeout 200ms health");
  EXPECT_EQ(outcome.exit, 5) << outcome.err;
}

TEST_F(KvctlLiveTest, NotAllowedIsSix) {
  const TemporaryFolder folder;
  const std::string endpoint = "unix:" + folder.path() + "/scripted";
  ScriptedServer server(endpoint);
  for (const int code : {grpc::StatusCode::UNAUTHENTICATED, grpc::StatusCode::PERMISSION_DENIED}) {
    server.FailNext({{.code = code, .reason = "NOT_FOR_YOU"}});
    const Outcome outcome = RunKvctl("KVCTL_ENDPOINT='" + endpoint + "'", "bench");
    EXPECT_EQ(outcome.exit, 6) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr("NOT_FOR_YOU"));
  }
}

TEST_F(KvctlLiveTest, CompletesCommandsFlagsValuesAndNames) {
  const std::string id = MakeSequence(served_);
  const auto complete = [&](const std::string& words) {
    return Lines(Run("__complete " + words).out);
  };
  EXPECT_THAT(complete("''"), IsSupersetOf({"health", "sequence", "block", "top", "bench"}));
  EXPECT_THAT(complete("seq"), ElementsAre("sequence"));
  EXPECT_THAT(complete("seq su"), ElementsAre("suspend"));
  EXPECT_THAT(complete("-o ''"), ElementsAre("table", "json"));
  EXPECT_THAT(complete("sequence drop --ex"), ElementsAre("--expected-generation"));
  EXPECT_THAT(complete("sequence drop --yes --out"), ElementsAre("--output"));
  EXPECT_THAT(complete("sequence get ''"), ElementsAre(id));
  EXPECT_THAT(complete("explain " + id.substr(0, 4)), ElementsAre(id));
  EXPECT_THAT(complete("model describe ''"), ElementsAre("small"));
  EXPECT_THAT(complete("explain " + id + " ''"), ElementsAre());
  EXPECT_EQ(RunKvctl("KVCTL_ENDPOINT=unix:/nowhere", "__complete sequence get ''").exit, 0);
}

TEST_F(KvctlLiveTest, BashLoadsItsCompletion) {
  const std::string bin = std::getenv("KVSERVICE_BIN_DIR");
  const std::string script = "source <('" + bin + "/kvctl' completion bash); COMP_WORDS=('" + bin +
                             "/kvctl' mod ''); COMP_WORDS[1]=model; COMP_CWORD=2; _kvctl; " +
                             "printf '%s\\n' \"${COMPREPLY[@]}\"";
  FILE* const pipe = popen(("bash -c \"$(cat <<'END'\n" + script + "\nEND\n)\"").c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string shown;
  char buffer[256];
  while (fgets(buffer, sizeof(buffer), pipe) != nullptr) shown += buffer;
  EXPECT_EQ(pclose(pipe), 0);
  EXPECT_THAT(Lines(shown), IsSupersetOf({"list", "get"}));
}

}  // namespace
}  // namespace kvservice::testing
