#include "tests/server/served_tls.h"

#include <gtest/gtest.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice::testing {
namespace {

// One per role and tenant.
IdentityMap Identities() {
  constexpr std::pair<const char*, const char*> kRoles[] = {{"worker", "ROLE_WORKER"},
                                                            {"prefill", "ROLE_PREFILL"},
                                                            {"reader", "ROLE_READER"},
                                                            {"admin", "ROLE_ADMIN"}};
  IdentityMap identities;
  for (const std::string tenant : {"default", kOtherTenant}) {
    for (const auto& [name, role] : kRoles) {
      const absl::Status added = identities.Add(
          absl::StrCat(R"({"uri": ")", UriOf(absl::StrCat(tenant, "/", name)), R"(", "tenant": ")",
                       tenant, R"(", "roles": [")", role, R"("]})"));
      EXPECT_TRUE(added.ok()) << added;
    }
  }
  return identities;
}

}  // namespace

TlsFiles WriteServerFiles(const Authority& authority, const std::string& folder) {
  const Credential server = authority.Issue({.names = {"DNS:localhost"}, .purpose = "serverAuth"});
  TlsFiles files = {.certificate = folder + "/cert",
                    .key = folder + "/key",
                    .client_ca = folder + "/ca",
                    .reload_s = 1};
  WritePrivate(files.client_ca, authority.pem());
  WritePrivate(files.certificate, server.certificate);
  WritePrivate(files.key, server.key);
  return files;
}

ServedEngineOptions WithTls(const Authority& authority, const std::string& folder) {
  ServedEngineOptions options;
  options.server.tls = WriteServerFiles(authority, folder);
  options.server.identities = Identities();
  options.server.listen = {{.endpoint = *ParseEndpoint("127.0.0.1:0")}};
  options.server.admin_listen = *ParseEndpoint("127.0.0.1:0");
  return options;
}

std::string UriOf(const std::string& who) { return "spiffe://example.org/" + who; }

CertificateSpec SpecOf(const std::string& who) { return {.names = {"URI:" + UriOf(who)}}; }

void WriteClientFiles(const Authority& authority, const std::string& who,
                      const std::string& prefix) {
  const Credential client = authority.Issue(SpecOf(who));
  WritePrivate(prefix + ".pem", client.certificate);
  WritePrivate(prefix + ".key", client.key);
}

}  // namespace kvservice::testing
