// kvctl as scripts use it: exit status, stdout and stderr of the program, against real servers.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "tests/client/kvctl_run.h"
#include "tests/server/certificates.h"
#include "tests/server/served_engine.h"
#include "tests/server/served_tls.h"

namespace kvservice::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using Json = nlohmann::json;

// As kvctl writes sizes of KiB.
std::string MemoryCell(uint64_t bytes) {
  EXPECT_LT(bytes, uint64_t{1} << 20);
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f KiB", static_cast<double>(bytes) / 1024);
  return text;
}

class KvctlTest : public ::testing::Test {
 protected:
  static Outcome RunWith(const std::string& environment, const std::string& arguments) {
    return RunKvctl(environment, arguments);
  }
  Outcome Run(const std::string& arguments) const {
    return RunKvctl(EnvironmentOf(served_), arguments);
  }
  std::string DataEndpoint() const { return "unix:" + served_.folder() + "/data"; }

  Json RunJson(const std::string& arguments) const {
    const Outcome outcome = Run("-o json " + arguments);
    EXPECT_EQ(outcome.exit, 0) << outcome.err;
    Json json = Json::parse(outcome.out, nullptr, false);
    EXPECT_FALSE(json.is_discarded()) << outcome.out;
    return json;
  }

  std::string MakeSequence() const { return kvservice::testing::MakeSequence(served_); }

  ServedEngine served_;
  TemporaryFolder folder_;
};

TEST_F(KvctlTest, SpeaksTlsToOtherHosts) {
  const Authority authority("ours");
  const ServedEngine far(WithTls(authority, folder_.path()));
  WriteClientFiles(authority, "default/worker", folder_.path() + "/worker");
  WriteClientFiles(authority, "default/admin", folder_.path() + "/admin");
  const auto run_as = [&](const std::string& who, const std::string& arguments) {
    const std::string file = folder_.path() + "/" + who;
    return RunKvctl("KVCTL_TLS_CA='" + folder_.path() + "/ca' KVCTL_TLS_SERVER_NAME=localhost",
                    "--endpoint " + far.server()->endpoints().back().ToString() +
                        " --admin-endpoint " + far.server()->admin_endpoint()->ToString() +
                        " --tls-cert '" + file + ".pem' --tls-key '" + file + ".key' " + arguments);
  };
  EXPECT_EQ(run_as("worker", "health").exit, 0);
  EXPECT_EQ(run_as("worker", "model list").exit, 0);
  EXPECT_EQ(run_as("admin", "server stats").exit, 0);
  // Not allowed.
  const Outcome refused = run_as("worker", "server stats");
  EXPECT_EQ(refused.exit, 6);
  EXPECT_THAT(refused.err, HasSubstr("AdminService.GetStats needs the role admin"));
  // A Unix socket has no TLS, whatever the environment says.
  EXPECT_EQ(RunKvctl("KVCTL_TLS_CA='" + folder_.path() + "/ca' KVCTL_TLS_CERT='" + folder_.path() +
                         "/worker.pem' KVCTL_TLS_KEY='" + folder_.path() + "/worker.key'",
                     "--endpoint " + DataEndpoint() + " health")
                .exit,
            0);
  EXPECT_EQ(RunKvctl("", "--endpoint 127.0.0.1:1 --tls-ca '" + folder_.path() + "/ca' health").exit,
            2);
}

TEST_F(KvctlTest, Health) {
  EXPECT_EQ(Run("health").exit, 0);
  EXPECT_EQ(Run("health").out, "serving\n");
  EXPECT_EQ(RunJson("health"),
            (Json{{"schema_version", 1}, {"service", ""}, {"status", "serving"}}));
  EXPECT_EQ(Run("health --service kvservice.v1.AttentionService").exit, 0);
  EXPECT_EQ(Run("health --service kvservice.v1.Unknown").exit, 3);
}

TEST_F(KvctlTest, VersionAsksNoServer) {
  const Outcome outcome = RunWith("KVCTL_ENDPOINT=unix:/nowhere", "version");
  EXPECT_EQ(outcome.exit, 0);
  EXPECT_THAT(outcome.out, StartsWith("kvctl "));
  EXPECT_TRUE(RunJson("version")["version"].is_string());
}

TEST_F(KvctlTest, ServerInfoAndStats) {
  MakeSequence();
  const Json info = RunJson("server info");
  EXPECT_EQ(info["device"], "reference");
  EXPECT_EQ(info["draining"], false);
  EXPECT_EQ(info["epoch"].get<std::string>().size(), 16U);
  EXPECT_GT(info["limits"]["rows_max"].get<uint64_t>(), 0U);
  EXPECT_THAT(Run("server info").out, HasSubstr("\ndraining "));

  const Json stats = RunJson("server stats");
  EXPECT_EQ(RunJson("stats"), stats);
  EXPECT_EQ(stats["sequence_count"], 1);
  EXPECT_EQ(stats["model_count"], 1);
  EXPECT_EQ(stats["totals"]["rows"], 2);
  EXPECT_EQ(stats["totals"]["certificates_proven"], 8);
  const std::string table = Run("server stats").out;
  EXPECT_THAT(table, HasSubstr("\nsequences                    1\n"));
  EXPECT_THAT(table, HasSubstr("\ndropped mass, largest bound  0\n"));
}

TEST_F(KvctlTest, Sequences) {
  EXPECT_EQ(RunJson("sequence list"),
            (Json{{"schema_version", 1}, {"sequences", Json::array()}, {"more", false}}));
  const std::string id = MakeSequence();
  const Json list = RunJson("seq list");
  ASSERT_EQ(list["sequences"].size(), 1U);
  EXPECT_EQ(list["sequences"][0]["id"], id);
  EXPECT_EQ(list["sequences"][0]["tenant"], "default");
  EXPECT_EQ(RunJson("seq list --tenant nobody")["sequences"].size(), 0U);
  const std::string memory = MemoryCell(list["sequences"][0]["bytes"].get<uint64_t>());
  EXPECT_EQ(Run("sequence list").out,
            "ID                                TENANT   MODEL  TOKENS  TIER    " +
                std::string("MEMORY").append(memory.size() - 6, ' ') +
                "  LEASE   READ    DROPPED MAX\n" + id + "  default  small  100     memory  " +
                memory + "  10m00s  100.0%  0\n");

  Json sequence = RunJson("sequence get " + id);
  EXPECT_EQ(sequence["schema_version"], 1);
  sequence.erase("schema_version");
  EXPECT_EQ(sequence, list["sequences"][0]);
  EXPECT_EQ(sequence["length_tokens"], 100);
  EXPECT_THAT(Run("seq get " + id).out, HasSubstr("\ntokens                       100\n"));
}

TEST_F(KvctlTest, LongListsAreCutAndSaySo) {
  MakeSequence();
  MakeSequence();
  const Outcome outcome = Run("seq list --limit 1 -o json");
  EXPECT_EQ(outcome.exit, 0);
  const Json list = Json::parse(outcome.out);
  EXPECT_EQ(list["sequences"].size(), 1U);
  EXPECT_EQ(list["more"], true);
  EXPECT_THAT(outcome.err, HasSubstr("--limit"));
  EXPECT_EQ(RunJson("seq list --limit 2")["more"], false);
}

TEST_F(KvctlTest, DropNeedsConsentAndTheRightGeneration) {
  const std::string id = MakeSequence();
  const Outcome refused = Run("sequence drop " + id);
  EXPECT_EQ(refused.exit, 2);
  EXPECT_THAT(refused.err, HasSubstr("--yes"));
  EXPECT_EQ(Run("sequence drop --yes --expected-generation 77 " + id).exit, 1);
  EXPECT_EQ(served_.engine()->Stats().sequences, 1U);
  const Json dropped = RunJson("sequence drop --yes " + id);
  EXPECT_EQ(dropped["id"], id);
  EXPECT_GT(dropped["freed_bytes"].get<uint64_t>(), 0U);
  EXPECT_EQ(served_.engine()->Stats().sequences, 0U);
  const Outcome gone = Run("sequence drop --yes " + id);
  EXPECT_EQ(gone.exit, 3);
  EXPECT_THAT(gone.err, HasSubstr("(SEQUENCE_NOT_FOUND)"));
  EXPECT_EQ(Run("sequence get " + id).exit, 3);
}

TEST_F(KvctlTest, Models) {
  const Json list = RunJson("model list");
  ASSERT_EQ(list["models"].size(), 1U);
  EXPECT_EQ(list["models"][0]["cache_dtype"], "bfloat16");
  EXPECT_EQ(Run("model list").out,
            "NAME   LAYERS  QUERY HEADS  KV HEADS  HEAD DIM  CACHE\n"
            "small  2       4            2         64        bfloat16\n");
  EXPECT_EQ(RunJson("model get small")["fingerprint"].get<std::string>().size(), 16U);
  EXPECT_EQ(Run("model get large").exit, 3);
}

TEST_F(KvctlTest, Audits) {
  Json audit = RunJson("audit");
  EXPECT_EQ(audit["violations"], 0);
  const std::string id = MakeSequence();
  audit = RunJson("audit " + id + " --keep-next 2");
  EXPECT_EQ(audit["keep_next_left"], 2);
  EXPECT_EQ(audit["kept_rows"], 0);
  EXPECT_THAT(Run("audit " + id).out, HasSubstr("\nviolations"));
  EXPECT_THAT(Run("audit --help").out, HasSubstr("deterministic  the bound always holds"));
  EXPECT_EQ(Run("audit " + std::string(32, '0')).exit, 3);
  EXPECT_EQ(Run("audit 12").exit, 2);
  EXPECT_EQ(Run("audit --keep-next 2").exit, 2);
  EXPECT_EQ(Run("audit " + id + " --calls 65").exit, 2);
  EXPECT_EQ(Run("audit " + id + " --replay 1:2:3").exit, 2);
  EXPECT_EQ(Run("audit " + id + " --replay " + std::string(32, '0') + ":0a:3:0").exit, 3);
}

TEST_F(KvctlTest, ExplainsLimits) {
  const std::string id = MakeSequence();
  const Json explained = RunJson("explain " + id + " --layer 1 --limits 0.5,0.25");
  ASSERT_EQ(explained["steps"].size(), 2U);
  EXPECT_EQ(explained["position"], 99);
  EXPECT_EQ(explained["steps"][1]["max_dropped_mass"], 0.25);
  EXPECT_EQ(explained["steps"][1]["groups"].size(), 2U);
  const std::string table = Run("explain " + id).out;
  EXPECT_THAT(table, StartsWith("LIMIT  KV HEAD  BYTES"));
  EXPECT_THAT(table, HasSubstr("\n0.02   all"));
  EXPECT_EQ(Run("explain " + id + " --limits 2").exit, 1);
  EXPECT_EQ(Run("explain " + id + " --layer 2").exit, 1);
  EXPECT_EQ(Run("explain " + std::string(32, '0')).exit, 3);
  EXPECT_EQ(Run("explain 12").exit, 2);
}

// The audit says that bounds were wrong, and the status tells it.
TEST(KvctlAuditTest, AViolationIsAnExitStatus) {
  const ServedEngine served(WithWrongBounds());
  const std::string id = MakeWronglyBounded(served);
  const auto run = [&](const std::string& arguments) {
    return RunKvctl(EnvironmentOf(served), arguments).exit;
  };
  EXPECT_EQ(run("audit " + id), 8);
  EXPECT_EQ(run("audit"), 8) << "the server's own audits count it, too";
  EXPECT_EQ(run("-q audit"), 8);
}

TEST_F(KvctlTest, WrongUsage) {
  for (const char* const arguments :
       {"", "nonsense", "server", "server nonsense", "seq get", "seq get 12", "seq list --limit 0",
        "-o xml health", "--timeout soon health", "--timeout 0 health", "server drain"}) {
    const Outcome outcome = Run(arguments);
    EXPECT_EQ(outcome.exit, 2) << arguments;
    EXPECT_EQ(outcome.out, "") << arguments;
    EXPECT_NE(outcome.err, "") << arguments;
  }
  EXPECT_EQ(Run("--help").exit, 0);
  EXPECT_EQ(served_.engine()->Stats().sequences, 0U);
}

TEST_F(KvctlTest, QuietPrintsNothing) {
  for (const auto& [arguments, exit] :
       {std::pair{"health", 0}, {"seq list", 0}, {"model get large", 3}, {"server drain", 2}}) {
    const Outcome outcome = Run("--quiet " + std::string(arguments));
    EXPECT_EQ(outcome.exit, exit) << arguments;
    EXPECT_EQ(outcome.out + outcome.err, "") << arguments;
  }
}

TEST_F(KvctlTest, TheAdminSideIsBesideTheDataSide) {
  // A server that does not listen there: the address that was tried is in the error.
  const Outcome outcome = RunWith("", "--endpoint " + DataEndpoint() + " server info");
  EXPECT_EQ(outcome.exit, 4);
  EXPECT_THAT(outcome.err, HasSubstr("/data.admin"));
  EXPECT_EQ(RunWith("XDG_RUNTIME_DIR=" + folder_.path(), "health").exit, 4);
}

TEST_F(KvctlTest, DrainEndsTheServer) {
  EXPECT_EQ(Run("server drain --yes --grace 5s").out, "draining\n");
  EXPECT_EQ(served_.server()->WaitForDrainRequest(), 5'000U);
  served_.server()->Drain(0);
  EXPECT_EQ(Run("health").exit, 4);
}

}  // namespace
}  // namespace kvservice::testing
