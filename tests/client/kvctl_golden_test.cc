// Every verb of kvctl in both formats, exit status and stderr included, against what was reviewed:
// tests/client/golden/. KVCTL_GOLDEN_UPDATE=1 writes the files anew.

#include <gtest/gtest.h>

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <string>

#include "tests/client/kvctl_run.h"
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

class GoldenTest : public ::testing::TestWithParam<const char*> {
 protected:
  static ServedEngineOptions Options(const TemporaryFolder& folder) {
    ServedEngineOptions options;
    options.engine.data_directory = folder.path() + "/store";
    return options;
  }

  // One command of the transcript.
  void Run(const std::string& arguments) { Add(arguments, false); }
  void RunTimed(const std::string& arguments) { Add(arguments, true); }

  void Add(const std::string& arguments, bool is_timed) {
    const Outcome outcome =
        RunKvctl(EnvironmentOf(served_) + " KVCTL_OUTPUT=" + GetParam(), arguments);
    std::string text = outcome.out;
    std::istringstream err(outcome.err);
    for (std::string line; std::getline(err, line);) text += "! " + line + "\n";
    text = names_.Replace(text);
    text = is_timed ? WithoutNumbers(text) : WithoutFileSizes(text);
    text = WithShortArrays(text);
    const std::string folder = served_.folder();
    for (size_t at = 0; (at = text.find(folder)) != std::string::npos;) {
      text.replace(at, folder.size(), "FOLDER");
    }
    transcript_ += "$ kvctl " + names_.Replace(arguments) + "\n" + text + "[exit " +
                   std::to_string(outcome.exit) + "]\n\n";
  }

  TemporaryFolder store_;
  ServedEngine served_{Options(store_)};
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
  Run("block list " + id);
  Run("block list " + id + " --layer 1 --limit 1");
  Run("block describe " + id + " 1");
  Run("block get " + id + " 7");
  Run("explain " + id + " --layer 1 --limits 0.5,0.25");
  Run("audit");
  Run("audit " + id + " --keep-next 2");
  Run("stats");
  Run("top --watch-count 1");
  Run("watch --watch-count 1");
  Run("sequence fork " + id + " --length 64 --lease 5m");
  Run("sequence fork " + id + " --length 1000");
  Run("sequence suspend " + id);
  Run("explain " + id);
  Run("sequence resume " + id);
  Run("sequence drop " + id);
  Run("sequence drop --yes --expected-generation 77 " + id);
  Run("sequence drop --yes " + id);
  Run("sequence drop --yes " + id);
  RunTimed("bench --count 3 --tokens 70 --layers 1");
  RunTimed("ping -c 2");
  Run("sequence suspend --watch 1s " + id);
  Run("completion bash");
  Run("server drain");
  Run("server drain --yes --grace 5s");

  const std::string path = GoldenPath(std::string(GetParam()) + ".txt");
  if (std::getenv("KVCTL_GOLDEN_UPDATE") != nullptr) std::ofstream(path) << transcript_;
  std::ostringstream golden;
  golden << std::ifstream(path).rdbuf();
  EXPECT_EQ(transcript_, golden.str()) << path;
}

INSTANTIATE_TEST_SUITE_P(Formats, GoldenTest, ::testing::Values("table", "json"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace kvservice::testing
