// The client library and a server that wants to see a certificate.

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "client/client.h"
#include "tests/server/certificates.h"
#include "tests/server/served_engine.h"
#include "tests/server/served_tls.h"

namespace kvservice::testing {
namespace {

class TlsClientTest : public ::testing::Test {
 protected:
  TlsClientTest()
      : served_(WithTls(authority_, folder_.path())),
        options_{.endpoint = served_.server()->endpoints().back().ToString(),
                 .tls = client::TlsOptions{.ca_file = Path("ca"),
                                           .certificate_file = Path("me.pem"),
                                           .key_file = Path("me.key"),
                                           .server_name = "localhost"}} {
    WriteClientFiles(authority_, "default/worker", Path("me"));
    options_.deadlines.connect = std::chrono::milliseconds(20'000);
  }
  std::string Path(const std::string& name) const { return folder_.path() + "/" + name; }

  // Of the field that is to blame.
  std::string Refused() const {
    const auto connected = client::Client::Connect(options_);
    return connected.ok() ? "" : client::FieldOf(connected.status());
  }

  const Authority authority_{"ours"};
  TemporaryFolder folder_;
  ServedEngine served_;
  client::ClientOptions options_;
};

TEST_F(TlsClientTest, IsWhoItsCertificateSays) {
  const auto connected = client::Client::Connect(options_);
  ASSERT_TRUE(connected.ok()) << connected.status();
  const auto sequence = (*connected)->CreateSequence({.model = kModel});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  // Another tenant finds nothing there.
  WriteClientFiles(authority_, "acme/worker", Path("me"));
  const auto other = client::Client::Connect(options_);
  ASSERT_TRUE(other.ok()) << other.status();
  client::Sequence theirs = (*other)->Adopt(sequence->id(), sequence->generation());
  EXPECT_EQ(theirs.Refresh().status().code(), absl::StatusCode::kNotFound);
  theirs.Detach();
  // And one that may only look creates nothing.
  WriteClientFiles(authority_, "default/reader", Path("me"));
  const auto reader = client::Client::Connect(options_);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->CreateSequence({.model = kModel}).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(TlsClientTest, WrongOptionsAreNamed) {
  const client::ClientOptions good = options_;
  options_.tls->ca_file = "";
  EXPECT_EQ(Refused(), "tls.ca_file");
  options_ = good;
  options_.tls->certificate_file = Path("none");
  EXPECT_EQ(Refused(), "tls.certificate_file");
  options_ = good;
  options_.tls->key_file = Path("none");
  EXPECT_EQ(Refused(), "tls.key_file");
  options_ = good;
  options_.endpoint = "unix:" + Path("socket");
  EXPECT_EQ(Refused(), "tls");
}

}  // namespace
}  // namespace kvservice::testing
