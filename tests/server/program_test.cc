// The server as a program: its command line, what it prints, how it ends.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/v1/admin.grpc.pb.h"
#include "tests/server/certificates.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"
#include "tests/server/served_tls.h"

namespace kvservice::testing {
namespace {

constexpr int kExitConfig = 78;

std::string Contents(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

// A mapping of at least `kib_min` KiB has the flag that keeps it out of core files.
bool HasMappingLeftOut(const std::string& smaps, uint64_t kib_min) {
  std::istringstream lines(smaps);
  uint64_t kib = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("Size:", 0) == 0) kib = std::stoull(line.substr(5));
    if (line.rfind("VmFlags:", 0) == 0 && kib >= kib_min && line.find(" dd") != std::string::npos) {
      return true;
    }
  }
  return false;
}

class ProgramTest : public ::testing::Test {
 protected:
  // A small server on sockets in the folder.
  std::vector<std::string> Arguments(std::vector<std::string> more = {}) const {
    std::vector<std::string> arguments = {"--listen", "unix:" + Path("data"), "--pool-bytes",
                                          "16MiB"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  std::string Path(const std::string& name) const { return folder_.path() + "/" + name; }
  // One on a loopback address with TLS, whose files are in the folder.
  std::vector<std::string> TlsArguments(const std::vector<std::string>& more = {}) const {
    const TlsFiles files = WriteServerFiles(authority_, folder_.path());
    WritePrivate(Path("who"),
                 R"({"uri": "spiffe://a/b", "tenant": "acme", "roles": ["ROLE_READER"]})");
    std::vector<std::string> arguments = {"--listen",        "127.0.0.1:0",   "--tls-cert",
                                          files.certificate, "--tls-key",     files.key,
                                          "--tls-client-ca", files.client_ca, "--identities-file",
                                          Path("who"),       "--pool-bytes",  "16MiB"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  const Authority authority_{"ours"};
  const TemporaryFolder folder_;
};

TEST_F(ProgramTest, AnnouncesItselfAndDrainsOnSignals) {
  for (const int signal : {SIGTERM, SIGINT}) {
    Program server("kvservice", Arguments({"--ready-file", Path("ready")}));
    ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
    const std::string expected =
        "listening on unix:" + Path("data") + "\nadmin on unix:" + Path("data.admin") + "\nready\n";
    EXPECT_EQ(server.output(), expected);
    EXPECT_EQ(Contents(Path("ready")), expected);
    server.Signal(signal);
    EXPECT_EQ(server.Wait(), 0);
    EXPECT_NE(server.errors().find("drained"), std::string::npos) << server.errors();
    EXPECT_NE(access(Path("data").c_str(), F_OK), 0);
    EXPECT_NE(access(Path("data.admin").c_str(), F_OK), 0);
  }
}

TEST_F(ProgramTest, DrainsWhenTheAdminSideSaysSo) {
  Program server("kvservice", Arguments());
  ASSERT_TRUE(server.WaitForLine("ready"));
  v1::DrainResponse response;
  EXPECT_EQ(
      ErrorText(v1::AdminService::NewStub(ConnectTo(*ParseEndpoint("unix:" + Path("data.admin"))))
                    ->Drain(NewContext().get(), {}, &response)),
      "OK");
  EXPECT_EQ(server.Wait(), 0);
}

TEST_F(ProgramTest, StartsAgainAfterAKill) {
  {
    Program killed("kvservice", Arguments());
    ASSERT_TRUE(killed.WaitForLine("ready"));
    killed.Signal(SIGKILL);
    EXPECT_EQ(killed.Wait(), 128 + SIGKILL);
  }
  EXPECT_EQ(access(Path("data").c_str(), F_OK), 0);
  Program server("kvservice", Arguments());
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  // A second one finds the address taken.
  Program second("kvservice", Arguments({"--admin-listen", "none"}));
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_NE(second.errors().find(Path("data")), std::string::npos) << second.errors();
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

// One line on stderr that names the flag, nothing on stdout, exit status 78.
TEST_F(ProgramTest, BadConfigurationsAreRefusedInOneLine) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"--listen", "0.0.0.0:50051"}, "--listen"},
      {{"--listen", "[::]:50051"}, "--listen"},
      {{"--listen", "example.com:80"}, "--listen"},
      {{"--listen", "unix:relative"}, "--listen"},
      {{"--listen", "tenant=a b,unix:/tmp/x"}, "--listen"},
      {{"--listen", ""}, "--listen"},
      {{"--admin-listen", "10.0.0.1:1"}, "--admin-listen"},
      {{"--admin-listen", "tenant=a,unix:/x"}, "--admin-listen"},
      {{"--socket-mode", "0777"}, "--socket-mode"},
      {{"--metrics-listen", "unix:/x"}, "--metrics-listen"},
      {{"--metrics-listen", "9464"}, "--metrics-listen"},
      {{"--slow-call", "0"}, "--slow-call"},
      {{"--pool-bytes", "lots"}, "--pool-bytes"},
      {{"--pool-bytes", "0"}, "--pool-bytes"},
      {{"--pool-bytes", "-1"}, "--pool-bytes"},
      {{"--pool-bytes"}, "--pool-bytes"},
      {{"--device", "quantum"}, "--device"},
      {{"--threads", "-1"}, "--threads"},
      {{"--threads", "100000"}, "--threads"},
      {{"--sequences-max", "0"}, "--sequences-max"},
      {{"--sequences-max", "many"}, "--sequences-max"},
      {{"--rows-max", "4294967296"}, "--rows-max"},
      {{"--tenant-quota", "pool-max"}, "--tenant-quota"},
      {{"--tenant-quota", "pool-max=lots"}, "--tenant-quota"},
      {{"--tenant-quota", "pool-max=1,pool-max=2"}, "--tenant-quota"},
      {{"--tenant-quota", "gpu-max=1"}, "--tenant-quota"},
      {{"--tenant-quota", "tenant=a b,pool-max=1"}, "--tenant-quota"},
      {{"--tenant-quota", "pool-reserved=1MiB"}, "--tenant-quota"},
      {{"--tenant-quota", "tenant=a,pool-reserved=1TiB"}, "--tenant-quota"},
      {{"--tenant-quota", "tenant=a,disk-max=1", "--tenant-quota", "tenant=a,pool-max=1"},
       "--tenant-quota"},
      {{"--tenant-quota", "disk-max=1", "--tenant-quota", "pool-max=1"}, "--tenant-quota"},
      {{"--lease-default", "10"}, "--lease-default"},
      {{"--lease-default", "2h", "--lease-max", "1h"}, "--lease-default"},
      {{"--lease-max", "2000h"}, "--lease-max"},
      {{"--message-bytes-max", "2GiB"}, "--message-bytes-max"},
      {{"--requests-bytes-max", "1KiB"}, "--requests-bytes-max"},
      {{"--io-threads", "0"}, "--io-threads"},
      {{"--audit-rate", "1.5"}, "--audit-rate"},
      {{"--audit-rate", "often"}, "--audit-rate"},
      {{"--audit-rows-max", "0"}, "--audit-rows-max"},
      {{"--draw-secret-file", "/no/such/file"}, "--draw-secret-file"},
      {{"--policy-file", "/no/such/file"}, "--policy-file: /no/such/file"},
      {{"--policy-file", "/"}, "--policy-file: /"},
      {{"--drain-grace", "soon"}, "--drain-grace"},
      {{"--log-level", "loud"}, "--log-level"},
      {{"--config", "/no/such/file"}, "--config"},
      {{"--no-such-flag"}, "--no-such-flag"},
      {{"stray"}, "stray"},
  };
  for (const auto& [arguments, flag] : cases) {
    Program server("kvservice", arguments);
    EXPECT_EQ(server.Wait(), kExitConfig) << arguments.front();
    EXPECT_EQ(server.output(), "");
    EXPECT_EQ(std::count(server.errors().begin(), server.errors().end(), '\n'), 1)
        << server.errors();
    EXPECT_NE(server.errors().find(flag), std::string::npos) << server.errors();
  }
}

TEST_F(ProgramTest, TheSecretFileMustBeTheOwnersAlone) {
  const std::string file = Path("secret");
  const auto expect_refused = [&](const char* why) {
    Program server("kvservice", Arguments({"--draw-secret-file", file}));
    EXPECT_EQ(server.Wait(), kExitConfig) << why;
    EXPECT_NE(server.errors().find("--draw-secret-file"), std::string::npos) << server.errors();
  };
  std::ofstream(file) << std::string(31, 's');
  ASSERT_EQ(chmod(file.c_str(), 0600), 0);
  expect_refused("too short");
  std::ofstream(file) << std::string(33, 's');
  expect_refused("too long");
  std::ofstream(file) << std::string(32, 's');
  ASSERT_EQ(chmod(file.c_str(), 0640), 0);
  expect_refused("others may read it");
  ASSERT_EQ(chmod(file.c_str(), 0600), 0);
  Program server("kvservice", Arguments({"--draw-secret-file", file}));
  EXPECT_TRUE(server.WaitForLine("ready")) << server.errors();
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_EQ(server.errors().find("ssss"), std::string::npos);
}

TEST_F(ProgramTest, PolicyFilesAreCheckedAtStart) {
  const std::string good = Path("good");
  std::ofstream(good) << R"([{"name": "mine", "policy": {"selector": "SELECTOR_SCAN"}}])";
  const std::string bad = Path("bad");
  std::ofstream(bad) << R"([{"name": "mine", "policy": {"selector": "SELECTOR_CIS"}}])";
  Program check("kvservice", Arguments({"--policy-file", good, "--check-config"}));
  EXPECT_EQ(check.Wait(), 0) << check.errors();
  for (const char* action : {"--check-config", "--log-level=info"}) {
    Program twice("kvservice", Arguments({"--policy-file", good, "--policy-file", bad, action}));
    EXPECT_EQ(twice.Wait(), kExitConfig) << action;
    EXPECT_EQ(twice.errors(),
              "kvservice: --policy-file: " + bad + ": [0] (mine): name mine is taken\n");
  }
  // The printed configuration names the file.
  Program print("kvservice", Arguments({"--policy-file", good, "--print-config"}));
  EXPECT_EQ(print.Wait(), 0);
  const std::string file = Path("config");
  std::ofstream(file) << print.output();
  Program again("kvservice", {"--config", file, "--print-config"});
  EXPECT_EQ(again.Wait(), 0) << again.errors();
  EXPECT_EQ(again.output(), print.output());
  EXPECT_NE(again.output().find(good), std::string::npos);
}

TEST_F(ProgramTest, PrintsWhatItWouldRunWith) {
  Program print(
      "kvservice",
      Arguments({"--print-config", "--lease-default", "90s", "--tenant-quota",
                 "tenant=a,pool-max=2MiB,pool-reserved=1MiB", "--tenant-quota", "disk-max=1GiB"}));
  EXPECT_EQ(print.Wait(), 0);
  EXPECT_NE(print.output().find(
                "tenant-quota=[\"tenant=a,pool-max=2MiB,pool-reserved=1MiB\", \"disk-max=1GiB\"]"),
            std::string::npos)
      << print.output();
  EXPECT_NE(print.output().find("lease-default=\"90s\""), std::string::npos) << print.output();
  EXPECT_NE(print.output().find("admin-listen=\"unix:" + Path("data.admin") + "\""),
            std::string::npos);
  // What it prints is a configuration file that says the same.
  const std::string file = Path("config");
  std::ofstream(file) << print.output();
  Program again("kvservice", {"--config", file, "--print-config"});
  EXPECT_EQ(again.Wait(), 0);
  EXPECT_EQ(again.output(), print.output());
  Program check("kvservice", {"--config", file, "--check-config"});
  EXPECT_EQ(check.Wait(), 0);

  std::ofstream(file, std::ios::app) << "no-such-key=1\n";
  Program unknown("kvservice", {"--config", file, "--check-config"});
  EXPECT_EQ(unknown.Wait(), kExitConfig);
  EXPECT_NE(unknown.errors().find("no-such-key"), std::string::npos) << unknown.errors();
}

TEST_F(ProgramTest, FlagsComeBeforeTheEnvironmentBeforeTheFile) {
  const std::string file = Path("config");
  std::ofstream(file) << "rows-max=1\nmodels-max=1\nsequences-max=1\n";
  setenv("KVSERVICE_ROWS_MAX", "2", 1);
  setenv("KVSERVICE_MODELS_MAX", "2", 1);
  Program print("kvservice", {"--config", file, "--rows-max", "3", "--print-config"});
  EXPECT_EQ(print.Wait(), 0);
  unsetenv("KVSERVICE_ROWS_MAX");
  unsetenv("KVSERVICE_MODELS_MAX");
  EXPECT_NE(print.output().find("\nrows-max=3\n"), std::string::npos) << print.output();
  EXPECT_NE(print.output().find("\nmodels-max=2\n"), std::string::npos) << print.output();
  EXPECT_NE(print.output().find("\nsequences-max=1\n"), std::string::npos) << print.output();
}

// SIGHUP is awaited before SIGTERM: what was sent before the end has been done.
TEST_F(ProgramTest, ReloadsWhatCanChange) {
  const std::string file = Path("config");
  const auto write = [&](const std::string& text) {
    std::ofstream(file) << "listen=\"unix:" + Path("data") + "\"\npool-bytes=16MiB\n" + text;
  };
  write("slow-call=5s\nmodels-max=2\n");
  Program server("kvservice", {"--config", file});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  write("slow-call=1s\nlog-level=debug\nmodels-max=3\n");
  server.Signal(SIGHUP);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  const std::string& log = server.errors();
  EXPECT_NE(log.find("configuration reloaded"), std::string::npos) << log;
  EXPECT_NE(log.find("--models-max has changed and needs a restart"), std::string::npos) << log;
  EXPECT_EQ(log.find("--slow-call"), std::string::npos) << log;
  EXPECT_EQ(log.find("--listen"), std::string::npos) << log;
  EXPECT_LT(log.find("configuration reloaded"), log.find("drained")) << log;
}

TEST_F(ProgramTest, AWrongReloadChangesNothing) {
  const std::string file = Path("config");
  std::ofstream(file) << "log-level=info\n";
  Program server("kvservice", Arguments({"--config", file}));
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  std::ofstream(file) << "log-level=off\nlease-default=soon\n";
  server.Signal(SIGHUP);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_NE(server.errors().find("reload refused, nothing has changed"), std::string::npos);
  EXPECT_NE(server.errors().find("lease-default"), std::string::npos) << server.errors();
  EXPECT_NE(server.errors().find("drained"), std::string::npos) << "the level is what it was";
}

TEST_F(ProgramTest, AnnouncesItsMetrics) {
  Program server("kvservice", Arguments({"--metrics-listen", "127.0.0.1:0"}));
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  EXPECT_NE(server.output().find("\nmetrics on 127.0.0.1:"), std::string::npos);
  EXPECT_EQ(server.output().find("metrics on 127.0.0.1:0\n"), std::string::npos) << "as bound";
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

// Of the sockets that clients use, and of the admin's.
TEST_F(ProgramTest, SocketsAreForThoseWhoMayConnect) {
  for (const mode_t mode : {0600U, 0660U}) {
    Program server("kvservice", Arguments({"--socket-mode", mode == 0600U ? "0600" : "0660"}));
    ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
    const auto mode_of = [&](const char* name) {
      struct stat facts {};
      EXPECT_EQ(stat(Path(name).c_str(), &facts), 0) << name;
      return facts.st_mode & 0777U;
    };
    EXPECT_EQ(mode_of("data"), mode);
    EXPECT_EQ(mode_of("data.lane"), 0600U) << "shared memory is for the same user alone";
    EXPECT_EQ(mode_of("data.admin"), 0600U);
    server.Signal(SIGTERM);
    EXPECT_EQ(server.Wait(), 0);
  }
}

// What is refused of TLS as operators ask for it.
TEST_F(ProgramTest, TlsNeedsAllOfItsFiles) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"--listen", "127.0.0.1:0", "--tls-cert", Path("cert")}, "--tls-key"},
      {{"--listen", "127.0.0.1:0", "--tls-key", Path("key")}, "--tls-cert"},
      {{"--listen", "127.0.0.1:0", "--tls-cert", Path("cert"), "--tls-key", Path("key"),
        "--tls-client-ca", Path("ca")},
       "--identities-file"},
      {{"--listen", "127.0.0.1:0", "--identities-file", Path("who")}, "--identities-file"},
      {TlsArguments({"--listen", "tenant=acme,0.0.0.0:0"}), "--listen"},
      {TlsArguments({"--identities-file", Path("cert")}), "--identities-file"},
      {TlsArguments({"--identities-file", Path("who")}), "--identities-file"},
      {TlsArguments({"--access-log", Path("no/such/folder")}), "--access-log"},
  };
  for (const auto& [arguments, flag] : cases) {
    Program refused("kvservice", arguments);
    EXPECT_EQ(refused.Wait(), kExitConfig) << flag;
    EXPECT_NE(refused.errors().find(flag), std::string::npos) << refused.errors();
  }
}

// Other hosts may come; the admin side stays on a Unix socket unless it is told otherwise.
TEST_F(ProgramTest, ServesTlsAndWritesDownWhatOperatorsDo) {
  Program server("kvservice", TlsArguments({"--listen", "0.0.0.0:0", "--listen",
                                            "unix:" + Path("data"), "--access-log", Path("log")}));
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  EXPECT_NE(server.output().find("listening on 0.0.0.0:"), std::string::npos);
  EXPECT_NE(server.output().find("admin on unix:" + Path("data.admin")), std::string::npos);
  v1::GetStatsResponse stats;
  const auto admin =
      v1::AdminService::NewStub(ConnectTo(*ParseEndpoint("unix:" + Path("data.admin"))));
  EXPECT_TRUE(admin->GetStats(NewContext().get(), {}, &stats).ok());
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0) << server.errors();
  const std::string log = Contents(Path("log"));
  EXPECT_NE(log.find("\"method\":\"AdminService.GetStats\",\"identity\":\"local\""),
            std::string::npos)
      << log;
  struct stat facts = {};
  ASSERT_EQ(stat(Path("log").c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0600U);
}

TEST_F(ProgramTest, ReadsIdentitiesAgainWhenToldTo) {
  Program server("kvservice", TlsArguments({"--admin-listen", "none"}));
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  const size_t begin = server.output().find("127.0.0.1:");
  const Endpoint endpoint =
      *ParseEndpoint(server.output().substr(begin, server.output().find('\n', begin) - begin));
  const auto channel =
      ConnectTls(endpoint, authority_.pem(), authority_.Issue({.names = {"URI:spiffe://a/b"}}));
  const auto ask = [&] {
    v1::GetStatsResponse none;
    return ErrorText(v1::AdminService::NewStub(channel)->GetStats(NewContext().get(), {}, &none));
  };
  EXPECT_EQ(ask(), "PERMISSION_DENIED ROLE_MISSING");
  WritePrivate(Path("who"), "nonsense");
  server.Signal(SIGHUP);
  EXPECT_EQ(ask(), "PERMISSION_DENIED ROLE_MISSING");
  WritePrivate(Path("who"), R"({"uri": "a:b", "tenant": "a", "roles": ["ROLE_READER"]})");
  server.Signal(SIGHUP);
  // The signal has its own thread; each question is a call.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::string got;
  do {
    got = ask();
  } while (got == "PERMISSION_DENIED ROLE_MISSING" && std::chrono::steady_clock::now() < end);
  EXPECT_EQ(got, "PERMISSION_DENIED IDENTITY_UNKNOWN");
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

// What they provoke is not written down for each of them.
TEST_F(ProgramTest, StrangersDoNotFillTheLog) {
  constexpr int kStrangers = 200;
  Program server("kvservice", TlsArguments({"--admin-listen", "none"}));
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  const size_t begin = server.output().find("127.0.0.1:");
  const Endpoint endpoint =
      *ParseEndpoint(server.output().substr(begin, server.output().find('\n', begin) - begin));
  for (int i = 0; i < kStrangers; ++i) {
    v1::GetStatsResponse none;
    EXPECT_FALSE(v1::AdminService::NewStub(ConnectTo(endpoint))
                     ->GetStats(NewContext().get(), {}, &none)
                     .ok());
  }
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_LT(std::count(server.errors().begin(), server.errors().end(), '\n'), kStrangers)
      << server.errors();
  EXPECT_NE(server.errors().find("[grpc]"), std::string::npos);
}

// A core file would hold what tenants have stored.
TEST_F(ProgramTest, MemoryStaysInTheProcess) {
  // The address sanitizer would take core files away by itself.
  const char* const options = std::getenv("ASAN_OPTIONS");
  setenv("ASAN_OPTIONS",
         (std::string(options == nullptr ? "" : options) + ":disable_coredump=0").c_str(), 1);
  for (const bool core_dumps : {false, true}) {
    rlimit all{};
    ASSERT_EQ(getrlimit(RLIMIT_CORE, &all), 0);
    all.rlim_cur = std::min<rlim_t>(all.rlim_max, 1 << 20);
    ASSERT_EQ(setrlimit(RLIMIT_CORE, &all), 0);
    Program server("kvservice",
                   Arguments({core_dumps ? "--core-dumps" : "--no-core-dumps", "--device", "cpu"}));
    ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
    rlimit limit{};
    ASSERT_EQ(prlimit(server.pid(), RLIMIT_CORE, nullptr, &limit), 0);
    // 1 is too little for a file, and tells the kernel to start no handler either.
    EXPECT_EQ(limit.rlim_cur, core_dumps ? all.rlim_cur : 1U);
    // The pool, which has 16 MiB, is marked as left out ("dd") either way.
    EXPECT_TRUE(
        HasMappingLeftOut(Contents("/proc/" + std::to_string(server.pid()) + "/smaps"), 16 << 10));
    server.Signal(SIGTERM);
    EXPECT_EQ(server.Wait(), 0);
  }
}

TEST_F(ProgramTest, TellsItsManager) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = Path("notify");
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  const FileDescriptor manager(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(bind(manager.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  setenv("NOTIFY_SOCKET", path.c_str(), 1);
  Program server("kvservice", Arguments());
  unsetenv("NOTIFY_SOCKET");
  ASSERT_TRUE(server.WaitForLine("ready")) << server.Wait() << server.errors();
  server.Signal(SIGHUP);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  std::string told;
  char buffer[64];
  for (ssize_t count = 0;
       (count = recv(manager.get(), buffer, sizeof(buffer), MSG_DONTWAIT)) > 0;) {
    told += std::string(buffer, static_cast<size_t>(count)) + " ";
  }
  EXPECT_EQ(told, "READY=1 RELOADING=1 READY=1 STOPPING=1 ");
}

TEST_F(ProgramTest, SaysWhatItIs) {
  Program version("kvservice", {"--version"});
  EXPECT_EQ(version.Wait(), 0);
  EXPECT_EQ(version.output().substr(0, 10), "kvservice ");
  Program help("kvservice", {"--help"});
  EXPECT_EQ(help.Wait(), 0);
  EXPECT_NE(help.output().find("--listen"), std::string::npos);
}

}  // namespace
}  // namespace kvservice::testing
