// Every verb of kvctl in both formats and every exit status, stderr included, against what was
// reviewed: tests/client/golden/. KVCTL_GOLDEN_UPDATE=1 writes the files anew.

#include <grpcpp/support/status.h>
#include <gtest/gtest.h>

#include <cctype>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/client/kvctl_run.h"
#include "tests/client/scripted_server.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr size_t kHexMin = 16;

// Ids, checksums and digests become numbers in the order of their first appearance, as wide as they
// were.
class Names {
 public:
  std::string Replace(const std::string& text) {
    std::string replaced;
    for (size_t at = 0; at < text.size();) {
      size_t end = at;
      while (end < text.size() && std::isxdigit(static_cast<unsigned char>(text[end])) != 0) ++end;
      const bool is_word =
          at == 0 ||
          (std::isalnum(static_cast<unsigned char>(text[at - 1])) == 0 && text[at - 1] != '.');
      if (is_word && end - at >= kHexMin) {
        replaced += NumberOf(text.substr(at, end - at));
        at = end;
      } else {
        const size_t next = std::max(end, at + 1);
        replaced += text.substr(at, next - at);
        at = next;
      }
    }
    return replaced;
  }

 private:
  std::string NumberOf(const std::string& hex) {
    const size_t number = numbers_.try_emplace(hex, numbers_.size() + 1).first->second;
    std::string text = std::to_string(number);
    return std::string(hex.size() - text.size(), '0') + text;
  }
  std::map<std::string, size_t> numbers_;
};

// Times and versions differ from run to run: nothing but what is around numbers is compared.
std::string WithoutNumbers(std::string text) {
  text = std::regex_replace(text, std::regex("(g|clang)[+][+]"), "COMPILER");
  text = std::regex_replace(text, std::regex("Release|Debug"), "TYPE");
  text = std::regex_replace(text, std::regex("[0-9]+([.][0-9]+)*(e-?[0-9]+)?"), "N");
  text = std::regex_replace(text, std::regex("N (B|KiB|MiB|GiB)"), "N BYTES");
  text = std::regex_replace(text, std::regex("N(ms|s|mNs)"), "TIME");
  return std::regex_replace(text, std::regex(" {2,}"), "  ");
}

// Files of the disk tier grow as its library likes.
std::string WithoutFileSizes(std::string text) {
  text = std::regex_replace(text, std::regex("files [0-9.]+ [KM]?i?B"), "files N");
  return std::regex_replace(text, std::regex("\"file_bytes\": ?[0-9]+"), "\"file_bytes\": N");
}

// Arrays and objects of nothing but numbers on one line.
std::string WithShortArrays(const std::string& text) {
  const std::string number = "(?:\"[a-z_]+\": )?[-+.0-9eN]+";
  const std::regex numbers("([\\[{])\\s*(" + number + "(?:,\\s*" + number + ")*)\\s*([\\]}])");
  std::string shortened;
  auto at = text.begin();
  for (std::sregex_iterator match(text.begin(), text.end(), numbers), end; match != end; ++match) {
    shortened.append(at, text.begin() + match->position());
    shortened +=
        match->str(1) + std::regex_replace(match->str(2), std::regex("\\s+"), " ") + match->str(3);
    at = text.begin() + match->position() + match->length();
  }
  return shortened.append(at, text.end());
}

std::string GoldenPath(const std::string& name) {
  return std::string(KVCTL_GOLDEN_FOLDER) + "/" + name;
}

std::string ReadFile(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class GoldenTest : public ::testing::TestWithParam<const char*> {
 protected:
  ServedEngineOptions Options() const {
    ServedEngineOptions options;
    options.engine.data_directory = store_.path() + "/store";
    options.server.transfers.targets = {{.endpoint = target_.server()->endpoints()[0]}};
    return options;
  }

  // One command of the transcript.
  void Run(const std::string& arguments) { RunAt(EnvironmentOf(served_), arguments); }
  void RunTimed(const std::string& arguments) {
    Add(arguments, RunWith(EnvironmentOf(served_), arguments), true);
  }
  void RunAt(const std::string& environment, const std::string& arguments) {
    Add(arguments, RunWith(environment, arguments), false);
  }
  static Outcome RunWith(const std::string& environment, const std::string& arguments) {
    return RunKvctl(environment + " KVCTL_OUTPUT=" + GetParam(), arguments);
  }

  void Add(const std::string& arguments, const Outcome& outcome, bool is_timed) {
    std::string text = outcome.out;
    std::istringstream err(outcome.err);
    for (std::string line; std::getline(err, line);) text += "! " + line + "\n";
    text = names_.Replace(text);
    text = is_timed ? WithoutNumbers(text) : WithoutFileSizes(text);
    text = WithShortArrays(text);
    transcript_ += WithoutFolders("$ kvctl " + names_.Replace(arguments) + "\n" + text) + "[exit " +
                   std::to_string(outcome.exit) + "]\n\n";
  }
  std::string WithoutFolders(std::string text) const {
    for (const auto& [folder, name] : std::map<std::string, std::string>{
             {served_.folder(), "FOLDER"}, {target_.folder(), "OTHER"}, {store_.path(), "STORE"}}) {
      for (size_t at = 0; (at = text.find(folder)) != std::string::npos;) {
        text.replace(at, folder.size(), name);
      }
    }
    return text;
  }

  void CompareWith(const std::string& name) const {
    const std::string path = GoldenPath(name);
    if (std::getenv("KVCTL_GOLDEN_UPDATE") != nullptr) std::ofstream(path) << transcript_;
    EXPECT_EQ(transcript_, ReadFile(path)) << path;
  }

  // Exit status 7: the server drains, and waits for a call that does not end.
  void AddUnhealthy();
  // 130: somebody at the keyboard does not want to wait for the next look.
  void AddInterrupted();

  const TemporaryFolder store_;
  const ServedEngine target_;
  ServedEngine served_{Options()};
  Names names_;
  std::string transcript_;
};

TEST_P(GoldenTest, EveryVerb) {
  RunTimed("version");
  Run("health");
  Run("health --service kvservice.v1.Unknown");
  Run("health --watch 1ms --watch-count 2");
  RunTimed("server info");
  Run("sequence list");
  Run("model list");
  Run("model describe small");
  Run("model get large");
  const std::string id = MakeSequence(served_);
  Run("sequence list");
  Run("sequence describe " + id);
  Run("sequence get 12");
  Run("quota list");
  Run("quota set default");
  Run("quota set default --pool-max 1KiB");
  Run("quota set default --pool-max 1x");
  Run("quota set default --yes --pool-max 1KiB");
  Run("quota set default --pool-max none --pool-reserved 64KiB --disk-max 1GiB");
  Run("quota set later --pool-reserved 1TiB");
  Run("quota set 'no name' --pool-max 1GiB");
  Run("quota list --limit 1");
  Run("quota reset default");
  Run("quota list --tenant nobody");
  Run("block list " + id);
  Run("block list " + id + " --layer 1 --limit 1");
  Run("block describe " + id + " 1");
  Run("block get " + id + " 7");
  Run("explain " + id + " --layer 1 --limits 0.5,0.25");
  Run("audit");
  Run("audit " + id + " --keep-next 2");
  Run("stats");
  Run("server stats");
  Run("top --watch-count 1");
  Run("watch --watch-count 1");
  Run("sequence fork " + id + " --length 64 --lease 5m");
  Run("sequence fork " + id + " --length 1000");
  Run("sequence suspend " + id);
  Run("explain " + id);
  Run("sequence resume " + id);
  const std::string target = target_.server()->endpoints()[0].ToString();
  Run("sequence transfer " + id + " " + target);
  Run("sequence transfer " + id + " unix:/nobody");
  Run("sequence drop " + id);
  Run("sequence drop --yes --expected-generation 77 " + id);
  Run("sequence drop --yes " + id);
  Run("sequence drop --yes " + id);
  const std::string moved = MakeSequence(served_);
  Run("sequence transfer --move " + moved + " " + target);
  Run("sequence transfer --move " + moved + " " + target);
  RunTimed("bench --count 3 --tokens 70 --layers 1");
  RunTimed("ping -c 2");
  Run("sequence suspend --watch 1s " + id);
  Run("server verify");
  Run("completion bash");
  Run("server drain");
  Run("server drain --yes --grace 5s");
  CompareWith(std::string(GetParam()) + ".txt");
}

void GoldenTest::AddUnhealthy() {
  Brake brake;
  ServedEngineOptions options;
  options.device = brake.On(*NewDevice("reference", {}));
  ServedEngine served(std::move(options));
  const std::string environment = "KVCTL_ENDPOINT='unix:" + served.folder() + "/admin'";
  brake.Set(true);
  const Handle handle = NewHandle(served);
  std::thread caller([&] {
    AttendStep attend(served.model(), 0, ListenAddress::kDefaultTenant);
    EXPECT_TRUE(attend.Add(handle, 0, {1}).Run(served.engine()).ok());
  });
  EXPECT_TRUE(Eventually([&] { return brake.call_count() > 0; }));
  std::thread drain([&] { served.server()->Drain(60'000); });
  EXPECT_TRUE(Eventually([&] { return RunWith(environment, "health").exit == 7; }));
  RunAt(environment, "health");
  brake.Set(false);
  caller.join();
  drain.join();
}

void GoldenTest::AddInterrupted() {
  Program kvctl("kvctl", {"--endpoint", "unix:" + served_.folder() + "/data", "-o", GetParam(),
                          "--watch", "60m", "health"});
  ASSERT_TRUE(Eventually([&] { return kvctl.ReadMore() && !kvctl.output().empty(); }));
  kvctl.Signal(SIGINT);
  const int exit = kvctl.Wait();
  Add("--watch 60m health", {.exit = exit, .out = kvctl.output(), .err = kvctl.errors()}, false);
}

TEST_P(GoldenTest, EveryExitStatus) {
  Run("health");
  Run("sequence drop --yes --expected-generation 77 " + MakeSequence(served_));
  Run("sequence drop");
  Run("model get large");
  RunAt("KVCTL_ENDPOINT='unix:" + store_.path() + "/nobody'", "health");

  const std::string scripted = "unix:" + store_.path() + "/scripted";
  ScriptedServer server(scripted);
  server.FailNext({{.code = grpc::StatusCode::DEADLINE_EXCEEDED, .reason = "TOO_LATE"}});
  RunAt("KVCTL_ENDPOINT='" + scripted + "'", "bench");
  server.FailNext({{.code = grpc::StatusCode::PERMISSION_DENIED, .reason = "NOT_FOR_YOU"}});
  RunAt("KVCTL_ENDPOINT='" + scripted + "'", "bench");

  AddUnhealthy();
  const ServedEngine wrong(WithWrongBounds());
  RunAt(EnvironmentOf(wrong), "audit " + MakeWronglyBounded(wrong));
  AddInterrupted();
  CompareWith(std::string("exits_") + GetParam() + ".txt");
}

// The words that may follow, without flags, as the shell's completion knows them.
std::vector<std::string> WordsAfter(const std::string& command) {
  std::istringstream lines(
      RunKvctl("KVCTL_ENDPOINT=unix:/nobody", "__complete " + command + " ''").out);
  std::vector<std::string> words;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with('-')) words.push_back(line);
  }
  return words;
}

// The transcripts are whole: a verb or an exit status that is new has none yet.
TEST_P(GoldenTest, NothingIsMissing) {
  const std::string verbs = ReadFile(GoldenPath(std::string(GetParam()) + ".txt"));
  size_t verb_count = 0;
  for (const std::string& noun : WordsAfter("")) {
    std::vector<std::string> commands;
    for (const std::string& verb : WordsAfter(noun)) {
      commands.push_back(absl::StrCat(noun, " ", verb));
    }
    if (commands.empty()) commands.push_back(noun);
    for (const std::string& command : commands) {
      const std::regex shown("\\$ kvctl " + command + "[ \\n]");
      EXPECT_TRUE(std::regex_search(verbs, shown)) << command;
      ++verb_count;
    }
  }
  EXPECT_GT(verb_count, 20U);

  const std::string help = RunKvctl("", "--help").out;
  const size_t begin = help.find("Exit status: ");
  ASSERT_NE(begin, std::string::npos);
  const std::string statuses = help.substr(begin, help.find('.', begin) - begin);
  const std::string exits = ReadFile(GoldenPath(std::string("exits_") + GetParam() + ".txt"));
  size_t status_count = 0;
  const std::regex number("[0-9]+");
  for (std::sregex_iterator at(statuses.begin(), statuses.end(), number), end; at != end; ++at) {
    EXPECT_NE(exits.find("[exit " + at->str() + "]"), std::string::npos) << at->str();
    ++status_count;
  }
  EXPECT_EQ(status_count, 10U);
}

INSTANTIATE_TEST_SUITE_P(Formats, GoldenTest, ::testing::Values("table", "json"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace kvservice::testing
