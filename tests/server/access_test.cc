// Who gets in and who does not: every method of the API, as proto/ declares it, against every wrong
// credential there is, on both sides of a server with TLS.

#include <grpcpp/channel.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/error.h"
#include "kvservice/server/access.h"
#include "kvservice/server/access_log.h"
#include "tests/server/api_methods.h"
#include "tests/server/certificates.h"
#include "tests/server/raw_call.h"
#include "tests/server/served_engine.h"
#include "tests/server/served_tls.h"

namespace kvservice::testing {
namespace {

constexpr char kPackage[] = "kvservice.v1.";
constexpr char kHealth[] = "/grpc.health.v1.Health/Check";
constexpr std::pair<Role, const char*> kRoles[] = {{Role::kWorker, "worker"},
                                                   {Role::kPrefill, "prefill"},
                                                   {Role::kReader, "reader"},
                                                   {Role::kAdmin, "admin"}};

class AccessTest : public ::testing::Test {
 protected:
  AccessTest() {
    ServedEngineOptions options = WithTls(authority_, folder_.path());
    options.access_log = &access_log_;
    served_ = std::make_unique<ServedEngine>(std::move(options));
  }

  Endpoint data() const { return served_->server()->endpoints().back(); }
  Endpoint admin() const { return *served_->server()->admin_endpoint(); }

  std::shared_ptr<grpc::Channel> Connect(const Endpoint& endpoint,
                                         const std::optional<Credential>& credential) const {
    return ConnectTls(endpoint, authority_.pem(), credential);
  }
  std::shared_ptr<grpc::Channel> ConnectAs(const Endpoint& endpoint, const std::string& who) const {
    return Connect(endpoint, authority_.Issue(SpecOf(who)));
  }

  // With an empty message: enough to be turned away, and to see that one was not.
  static std::string Try(const std::shared_ptr<grpc::Channel>& channel, const std::string& path) {
    return ErrorText(CallRaw(channel, path, BytesOf(std::string())));
  }

  // What the access log has got since it was asked last.
  std::vector<nlohmann::json> Logged() {
    // Lines about refusals are bounded per second.
    served_->clock()->AdvanceMs(1000);
    return std::exchange(logged_, {});
  }

  const Authority authority_{"ours"};
  FakeClock log_clock_;
  std::vector<nlohmann::json> logged_;
  AccessLog access_log_{&log_clock_, [this](const std::string& line) {
                          logged_.push_back(nlohmann::json::parse(line));
                          log_clock_.AdvanceMs(1000);
                        }};
  TemporaryFolder folder_;
  std::unique_ptr<ServedEngine> served_;
};

// ---- Credentials that do not get as far as a call
// ------------------------------------------------

struct WrongCredential {
  const char* name;
  std::optional<Credential> credential;
};

std::vector<WrongCredential> WrongCredentials(const Authority& ours, const Authority& other) {
  const CertificateSpec good = SpecOf("default/worker");
  CertificateSpec expired = good;
  expired.ends_s = -60;
  CertificateSpec future = good;
  future.begins_s = 600;
  CertificateSpec server = good;
  server.purpose = "serverAuth";
  // As if a client could sign for others.
  return {{"none", std::nullopt},
          {"another authority's", other.Issue(good)},
          {"expired", ours.Issue(expired)},
          {"not yet valid", ours.Issue(future)},
          {"self-signed", SelfSigned(good)},
          {"a server's", ours.Issue(server)},
          {"another's key",
           Credential{.certificate = ours.Issue(good).certificate, .key = ours.Issue(good).key}}};
}

TEST_F(AccessTest, NoCallComesByAConnectionThatShouldNotBe) {
  const Authority other("theirs");
  size_t call_count = 0;
  for (const ApiMethod& method : AllMethods()) {
    for (const Endpoint& endpoint : {data(), admin()}) {
      for (const WrongCredential& wrong : WrongCredentials(authority_, other)) {
        EXPECT_EQ(Try(Connect(endpoint, wrong.credential), method.path), "UNAVAILABLE")
            << wrong.name << " " << method.path;
        ++call_count;
      }
      EXPECT_EQ(Try(ConnectTo(endpoint), method.path), "UNAVAILABLE") << "no TLS " << method.path;
    }
  }
  EXPECT_GE(call_count, 2 * 7 * 28U);
  // None of it reached the gate.
  EXPECT_TRUE(Logged().empty());
  // And the same with the right one does.
  EXPECT_EQ(Try(ConnectAs(data(), "default/reader"), "/kvservice.v1.ModelService/List"), "OK");
}

TEST_F(AccessTest, AClientDoesNotTalkToAnotherServer) {
  const Authority other("theirs");
  const auto channel = ConnectTls(data(), other.pem(), authority_.Issue(SpecOf("default/worker")));
  EXPECT_EQ(Try(channel, "/kvservice.v1.ModelService/List"), "UNAVAILABLE");
}

// ---- Callers that are known to be the wrong ones
// -------------------------------------------------

TEST_F(AccessTest, CertificatesWithoutAKnownIdentityGetNowhere) {
  struct Case {
    CertificateSpec spec;
    const char* expected;
  };
  const Case cases[] = {
      {SpecOf("nobody"), "PERMISSION_DENIED IDENTITY_UNKNOWN"},
      // The beginning of one that is known, and one with something after it.
      {SpecOf("default/worke"), "PERMISSION_DENIED IDENTITY_UNKNOWN"},
      {SpecOf("default/worker/1"), "PERMISSION_DENIED IDENTITY_UNKNOWN"},
      {{.names = {"DNS:worker.example.org"}, .common_name = UriOf("default/worker")},
       "UNAUTHENTICATED IDENTITY_MISSING"},
      {{.names = {}, .common_name = UriOf("default/worker")}, "UNAUTHENTICATED IDENTITY_MISSING"},
      {{.names = {"URI:" + UriOf("default/worker"), "URI:" + UriOf("default/admin")}},
       "UNAUTHENTICATED IDENTITY_MISSING"},
  };
  for (const Case& wrong : cases) {
    for (const Endpoint& endpoint : {data(), admin()}) {
      const auto channel = Connect(endpoint, authority_.Issue(wrong.spec));
      for (const ApiMethod& method : AllMethods()) {
        EXPECT_EQ(Try(channel, method.path), wrong.expected) << method.path;
        const std::vector<nlohmann::json> lines = Logged();
        ASSERT_EQ(lines.size(), 1U) << method.path;
        EXPECT_EQ(kPackage + lines[0].at("method").get<std::string>(), method.full_name);
        EXPECT_EQ(lines[0].at("tenant"), "");
      }
      EXPECT_EQ(Try(channel, kHealth), wrong.expected);
      EXPECT_EQ(Try(channel, "/no.such.Service/Method"), wrong.expected);
      Logged();
    }
  }
}

// What a caller with one role is told; empty: it was let in, whatever became of the call.
std::string Expected(const ApiMethod& method, Role role, bool is_admin_side) {
  if (!method.any_of.Has(role)) return "PERMISSION_DENIED ROLE_MISSING";
  if (is_admin_side && role != Role::kAdmin) return "PERMISSION_DENIED ROLE_MISSING";
  // Not here: no role makes it so.
  const bool is_there = is_admin_side
                            ? method.service == "AdminService" || method.service == "ModelService"
                            : method.service != "AdminService";
  return is_there ? "" : "UNIMPLEMENTED METHOD_NOT_SERVED";
}

TEST_F(AccessTest, EveryMethodAsksForItsRole) {
  size_t let_in = 0;
  size_t turned_away = 0;
  for (const bool is_admin_side : {false, true}) {
    for (const auto& [role, name] : kRoles) {
      const auto channel =
          ConnectAs(is_admin_side ? admin() : data(), std::string("default/") + name);
      for (const ApiMethod& method : AllMethods()) {
        const std::string expected = Expected(method, role, is_admin_side);
        const std::string got = Try(channel, method.path);
        const std::vector<nlohmann::json> lines = Logged();
        const bool is_refusal = expected.rfind("PERMISSION_DENIED", 0) == 0;
        EXPECT_EQ(lines.size(), is_refusal || is_admin_side ? 1U : 0U) << name << method.path;
        if (expected.empty()) {
          ++let_in;
          EXPECT_EQ(got.find("PERMISSION_DENIED"), std::string::npos) << name << method.path;
          EXPECT_EQ(got.find("UNAUTHENTICATED"), std::string::npos) << name << method.path;
          EXPECT_EQ(got.find("UNAVAILABLE"), std::string::npos) << name << method.path;
        } else {
          turned_away += is_refusal ? 1 : 0;
          EXPECT_EQ(got, expected) << name << method.path;
        }
      }
      // Whoever has a place here may ask for health, and hears that other methods are none.
      const bool is_welcome = !is_admin_side || role == Role::kAdmin;
      EXPECT_EQ(Try(channel, kHealth), is_welcome ? "OK" : "PERMISSION_DENIED ROLE_MISSING");
      EXPECT_EQ(Try(channel, "/no.such.Service/Method"),
                is_welcome ? "UNIMPLEMENTED METHOD_UNKNOWN" : "PERMISSION_DENIED ROLE_MISSING");
      Logged();
    }
  }
  EXPECT_GE(let_in, 40U);
  EXPECT_GE(turned_away, 100U);
}

// What proto/ must go on saying.
TEST_F(AccessTest, RolesMeanWhatTheyAreCalled) {
  for (const ApiMethod& method : AllMethods()) {
    EXPECT_FALSE(method.any_of.empty()) << method.full_name;
    if (method.service == "AdminService") {
      EXPECT_EQ(method.any_of, RoleSet{Role::kAdmin}) << method.full_name;
    } else if (method.service == "AttentionService") {
      EXPECT_EQ(method.any_of, RoleSet{Role::kWorker}) << method.full_name;
    } else if (method.any_of.Has(Role::kReader)) {
      const std::string name = method.full_name.substr(method.full_name.rfind('.') + 1);
      EXPECT_TRUE(name == "Get" || name == "List") << method.full_name;
    }
  }
  EXPECT_TRUE(AccessOf("kvservice.v1.SequenceService.NoSuch").any_of.empty());
}

// Nor does the mere lapse of time let somebody stay who would not get in.
TEST_F(AccessTest, AConnectionDoesNotOutliveItsCertificate) {
  const auto channel = ConnectAs(data(), "default/worker");
  EXPECT_EQ(Try(channel, "/kvservice.v1.ModelService/List"), "OK");
  // The server's clock stands in the past of the certificate's end; a hundred years are enough.
  served_->clock()->AdvanceMs(uint64_t{100} * 365 * 86'400'000);
  for (const ApiMethod& method : AllMethods()) {
    EXPECT_EQ(Try(channel, method.path), "UNAUTHENTICATED CERTIFICATE_EXPIRED") << method.path;
  }
  EXPECT_EQ(Try(channel, kHealth), "UNAUTHENTICATED CERTIFICATE_EXPIRED");
}

// A certificate cannot be taken back, but what it stands for can.
TEST_F(AccessTest, AnIdentityThatIsTakenAwayIsGoneAtOnce) {
  const auto channel = ConnectAs(data(), "default/worker");
  EXPECT_EQ(Try(channel, "/kvservice.v1.ModelService/List"), "OK");
  IdentityMap demoted;
  ASSERT_TRUE(demoted
                  .Add("{\"uri\": \"" + UriOf("default/worker") +
                       R"(", "tenant": "default", "roles": ["ROLE_READER"]})")
                  .ok());
  served_->server()->SetIdentities(std::move(demoted));
  EXPECT_EQ(Try(channel, "/kvservice.v1.ModelService/List"), "OK");
  EXPECT_EQ(Try(channel, "/kvservice.v1.ModelService/Register"), "PERMISSION_DENIED ROLE_MISSING");
  served_->server()->SetIdentities({});
  for (const ApiMethod& method : AllMethods()) {
    EXPECT_EQ(Try(channel, method.path), "PERMISSION_DENIED IDENTITY_UNKNOWN") << method.path;
  }
}

TEST_F(AccessTest, ReflectionIsNotServedWithTls) {
  EXPECT_EQ(Try(ConnectAs(data(), "default/reader"),
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
            "UNIMPLEMENTED METHOD_NOT_SERVED");
}

// ---- Certificates come and go
// --------------------------------------------------------------------

TEST_F(AccessTest, NewCertificatesComeIntoForceWithoutARestart) {
  const Authority next("next");
  const Credential ours = authority_.Issue(SpecOf("default/worker"));
  const auto channel = Connect(data(), ours);
  EXPECT_EQ(Try(channel, kHealth), "OK");
  WriteServerFiles(next, folder_.path());
  // Each attempt is a handshake; the files are looked at once a second.
  const auto try_next = [&] {
    return Try(ConnectTls(data(), next.pem(), next.Issue(SpecOf("default/worker"))), kHealth);
  };
  std::string got = "UNAVAILABLE";
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (got == "UNAVAILABLE" && std::chrono::steady_clock::now() < end) got = try_next();
  EXPECT_EQ(got, "OK");
  // The old authority's are not believed any more; who is connected stays.
  EXPECT_EQ(Try(ConnectTls(data(), next.pem(), ours), kHealth), "UNAVAILABLE");
  EXPECT_EQ(Try(channel, kHealth), "OK");
}

// ---- Without TLS
// ---------------------------------------------------------------------------------

TEST(ListenTest, OtherHostsReachNothingWithoutTls) {
  TestEngine engine;
  SeededRandom random(1);
  for (const bool is_admin : {false, true}) {
    for (const char* address : {"0.0.0.0:0", "[::]:0", "10.0.0.1:0", "[2001:db8::1]:0"}) {
      ServerOptions options;
      options.listen = {{.endpoint = *ParseEndpoint(is_admin ? "127.0.0.1:0" : address)}};
      if (is_admin) options.admin_listen = *ParseEndpoint(address);
      const auto server =
          NewServer(options, engine.get(),
                    {.clock = &engine.clock, .random = &random, .transport = SystemTransport()});
      ASSERT_FALSE(server.ok()) << address;
      EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << address;
      EXPECT_EQ(DetailsOf(server.status()).reason, "TLS_REQUIRED") << address;
      EXPECT_EQ(DetailsOf(server.status()).field, "listen") << address;
    }
  }
}

// ---- Files
// ---------------------------------------------------------------------------------------

TEST(IdentityMapTest, TakesWhatIsRightAndNamesWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "no identity"},
      {"[]", "no identity"},
      {"[{}]", "[0]: uri"},
      {R"({"uri": "worker", "tenant": "a", "roles": ["ROLE_WORKER"]})", "[0]: uri"},
      {R"({"uri": "a:b", "roles": ["ROLE_WORKER"]})", "[0]: tenant"},
      {R"({"uri": "a:b", "tenant": "a b", "roles": ["ROLE_WORKER"]})", "[0]: tenant"},
      {R"({"uri": "a:b", "tenant": "a"})", "[0]: roles"},
      {R"({"uri": "a:b", "tenant": "a", "roles": ["ROLE_UNSPECIFIED"]})", "[0]: roles"},
      {R"({"uri": "a:b", "tenant": "a", "roles": [9]})", "[0]: roles"},
      {R"({"uri": "a:b", "tenant": "a", "roles": ["ROLE_KING"]})", "ROLE_KING"},
      {R"({"uri": "a:b", "tenant": "a", "roles": ["ROLE_WORKER"], "x": 1})", "x"},
      {R"([{"uri": "a:b", "tenant": "a", "roles": ["ROLE_WORKER"]},
          {"uri": "a:b", "tenant": "b", "roles": ["ROLE_ADMIN"]}])",
       "[1]: uri is there twice"},
      {"[", ""},
  };
  for (const auto& [text, problem] : cases) {
    IdentityMap identities;
    const absl::Status status = identities.Add(text);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_NE(std::string(status.message()).find(problem), std::string::npos) << status;
  }
  IdentityMap identities;
  ASSERT_TRUE(
      identities.Add(R"({"uri": "a:b", "tenant": "t", "roles": ["ROLE_READER", "ROLE_PREFILL"]})")
          .ok());
  Caller caller = {.identity = "a:b"};
  identities.Resolve(&caller);
  EXPECT_EQ(caller.tenant, "t");
  EXPECT_EQ(caller.roles, (RoleSet{Role::kPrefill, Role::kReader}));
  Caller stranger = {.identity = "a:"};
  identities.Resolve(&stranger);
  EXPECT_EQ(stranger.tenant, "");
  EXPECT_TRUE(stranger.roles.empty());
  EXPECT_EQ(identities.AddFile("/no/such/file").code(), absl::StatusCode::kNotFound);
}

TEST(TlsFilesTest, WrongFilesAreNamed) {
  const TemporaryFolder folder;
  const auto path = [&](const std::string& name) { return folder.path() + "/" + name; };
  const Authority authority("ours");
  const Credential one = authority.Issue({.names = {"DNS:localhost"}, .purpose = "serverAuth"});
  const Credential two = authority.Issue({.names = {"DNS:localhost"}, .purpose = "serverAuth"});
  WritePrivate(path("cert"), one.certificate);
  WritePrivate(path("key"), one.key);
  WritePrivate(path("other_key"), two.key);
  WritePrivate(path("ca"), authority.pem());
  WritePrivate(path("junk"), "junk");
  WritePrivate(path("open_key"), one.key);
  ASSERT_EQ(chmod(path("open_key").c_str(), 0644), 0);
  const auto check = [&](const char* cert, const char* key, const char* ca) {
    const absl::Status status =
        CheckTlsFiles({.certificate = path(cert), .key = path(key), .client_ca = path(ca)});
    return status.ok() ? std::string("OK") : DetailsOf(status).field;
  };
  EXPECT_EQ(check("cert", "key", "ca"), "OK");
  EXPECT_EQ(check("none", "key", "ca"), "--tls-cert");
  EXPECT_EQ(check("junk", "key", "ca"), "--tls-cert");
  EXPECT_EQ(check("cert", "none", "ca"), "--tls-key");
  EXPECT_EQ(check("cert", "junk", "ca"), "--tls-key");
  EXPECT_EQ(check("cert", "other_key", "ca"), "--tls-key");
  EXPECT_EQ(check("cert", "open_key", "ca"), "--tls-key");
  EXPECT_EQ(check("cert", "key", "none"), "--tls-client-ca");
  EXPECT_EQ(check("cert", "key", "key"), "--tls-client-ca");
}

// ---- The access log
// ------------------------------------------------------------------------------

TEST(AccessLogTest, RefusalsAreBoundedAndCounted) {
  FakeClock clock;
  std::vector<nlohmann::json> lines;
  AccessLog log(&clock,
                [&](const std::string& line) { lines.push_back(nlohmann::json::parse(line)); });
  const MethodAccess method = {.name = "SequenceService.Get", .any_of = {Role::kReader}};
  const Caller caller = {.identity = "a:\xff\n", .peer = "ipv4:10.0.0.7:1"};
  const absl::Status denied = CheckAccess(method, caller);
  const absl::Status fine;
  for (uint32_t i = 0; i < AccessLog::kRefusalsPerSecondMax + 5; ++i) {
    log.Ended("data", {.method = method, .caller = caller, .status = denied});
  }
  // What was let in on the data side is not worth a line; on the admin side it is, bound or not.
  log.Ended("data", {.method = method, .caller = caller, .status = fine});
  EXPECT_EQ(lines.size(), AccessLog::kRefusalsPerSecondMax);
  log.Ended("admin", {.method = method, .caller = caller, .status = fine, .subject = "00ff"});
  ASSERT_EQ(lines.size(), AccessLog::kRefusalsPerSecondMax + 1);
  EXPECT_EQ(lines.back().at("suppressed"), 5);
  EXPECT_EQ(lines.back().at("code"), "OK");
  EXPECT_EQ(lines.back().at("subject"), "00ff");
  EXPECT_EQ(lines.back().at("side"), "admin");
  EXPECT_EQ(lines.front().at("reason"), "IDENTITY_UNKNOWN");
  EXPECT_EQ(lines.front().at("peer"), "ipv4:10.0.0.7:1");
  EXPECT_EQ(lines.front().at("time").get<std::string>().size(), 24U);
  clock.AdvanceMs(1000);
  log.Ended("data", {.method = method, .caller = caller, .status = denied});
  EXPECT_EQ(lines.size(), AccessLog::kRefusalsPerSecondMax + 2);
  EXPECT_FALSE(lines.back().contains("suppressed"));
}

}  // namespace
}  // namespace kvservice::testing
