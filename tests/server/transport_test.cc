// Addresses, quantities, sockets, and the loop that accepts on them.

#include "kvservice/server/transport.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/server/accept_loop.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/quantity.h"
#include "tests/kvservice/fakes.h"
#include "tests/server/cut_proxy.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

TEST(EndpointTest, ReadsAndWritesAddresses) {
  const std::pair<const char*, const char*> cases[] = {{"unix:/run/kv.sock", "unix:/run/kv.sock"},
                                                       {"127.0.0.1:50051", "127.0.0.1:50051"},
                                                       {"localhost:1", "127.0.0.1:1"},
                                                       {"[::1]:65535", "[::1]:65535"},
                                                       {"10.0.0.1:0", "10.0.0.1:0"}};
  for (const auto& [text, expected] : cases) {
    const absl::StatusOr<Endpoint> endpoint = ParseEndpoint(text);
    ASSERT_TRUE(endpoint.ok()) << endpoint.status();
    EXPECT_EQ(endpoint->ToString(), expected);
  }
  for (const char* text : {"", "unix:", "unix:relative", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x",
                           "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:1x", "example.com:80",
                           "[::1:80", ":80", "http://127.0.0.1:80"}) {
    EXPECT_FALSE(ParseEndpoint(text).ok()) << text;
  }
  EXPECT_TRUE(ParseEndpoint("unix:/" + std::string(106, 'x')).ok());
  EXPECT_FALSE(ParseEndpoint("unix:/" + std::string(107, 'x')).ok());
}

TEST(EndpointTest, KnowsWhatOtherHostsCanReach) {
  for (const char* text : {"unix:/x", "127.0.0.1:1", "127.255.0.9:1", "[::1]:1"}) {
    EXPECT_TRUE(ParseEndpoint(text)->IsLocal()) << text;
  }
  for (const char* text : {"0.0.0.0:1", "[::]:1", "128.0.0.1:1", "10.0.0.1:1", "[fe80::1]:1"}) {
    EXPECT_FALSE(ParseEndpoint(text)->IsLocal()) << text;
  }
}

TEST(EndpointTest, ListenAddressesNameTheirTenant) {
  EXPECT_EQ(ParseListenAddress("unix:/x")->tenant, "default");
  EXPECT_EQ(ParseListenAddress("tenant=a-B_3.c,127.0.0.1:1")->tenant, "a-B_3.c");
  EXPECT_EQ(ParseListenAddress("tenant=acme,unix:/x")->endpoint.path, "/x");
  for (const std::string& text :
       {std::string("tenant=acme"), std::string("tenant=,unix:/x"),
        std::string("tenant=a b,unix:/x"), std::string("tenant=a/b,unix:/x"),
        "tenant=" + std::string(65, 'a') + ",unix:/x", std::string("tenant=acme,")}) {
    EXPECT_FALSE(ParseListenAddress(text).ok()) << text;
  }
}

TEST(QuantityTest, ReadsUnits) {
  EXPECT_EQ(ParseBytes("4GiB"), uint64_t{4} << 30);
  EXPECT_EQ(ParseBytes("10kB"), 10'000U);
  EXPECT_EQ(ParseBytes("7"), 7U);
  EXPECT_EQ(ParseMilliseconds("250ms"), 250U);
  EXPECT_EQ(ParseMilliseconds("24h"), 86'400'000U);
  for (const char* text : {"", "GiB", "4 GiB", "4gib", "-4GiB", "4.5GiB", "4GiBx", "0x4",
                           "18446744073709551616", "17179869184GiB"}) {
    EXPECT_EQ(ParseBytes(text), std::nullopt) << text;
  }
  for (const char* text : {"", "10", "s", "1d", "-1s", "1.5s"}) {
    EXPECT_EQ(ParseMilliseconds(text), std::nullopt) << text;
  }
  for (const uint64_t number :
       {uint64_t{0}, uint64_t{1}, uint64_t{4} << 30, uint64_t{12'345}, uint64_t{3'000'000}}) {
    EXPECT_EQ(ParseBytes(BytesText(number)), number);
    EXPECT_EQ(ParseMilliseconds(MillisecondsText(number)), number);
  }
}

class TransportTest : public ::testing::Test {
 protected:
  Endpoint Path(const std::string& name) const {
    Endpoint endpoint;
    endpoint.path = folder_.path() + "/" + name;
    return endpoint;
  }
  const TemporaryFolder folder_;
};

TEST_F(TransportTest, UnixSocketsAreTheOwnersAlone) {
  const auto listener = SystemTransport()->Listen(Path("s"));
  ASSERT_TRUE(listener.ok()) << listener.status();
  struct stat entry {};
  ASSERT_EQ(stat(Path("s").path.c_str(), &entry), 0);
  EXPECT_EQ(entry.st_mode & 0777, 0600U);
}

TEST_F(TransportTest, AStaleSocketIsReplacedALiveOneIsNot) {
  {
    // What a killed server leaves: a socket file that nobody listens on.
    auto listener = SystemTransport()->Listen(Path("s"));
    ASSERT_TRUE(listener.ok());
    ASSERT_EQ(link(Path("s").path.c_str(), Path("stale").path.c_str()), 0);
  }
  EXPECT_NE(access(Path("s").path.c_str(), F_OK), 0);
  const auto replaced = SystemTransport()->Listen(Path("stale"));
  ASSERT_TRUE(replaced.ok()) << replaced.status();
  EXPECT_EQ(SystemTransport()->Listen(Path("stale")).status().code(),
            absl::StatusCode::kAlreadyExists);
}

TEST_F(TransportTest, ErrorsTellWhatToDo) {
  EXPECT_EQ(SystemTransport()->Listen(Path("no/such/folder")).status().code(),
            absl::StatusCode::kNotFound);
  // Never a file that is not a socket.
  ASSERT_EQ(symlink("/dev/null", Path("file").path.c_str()), 0);
  EXPECT_EQ(SystemTransport()->Listen(Path("file")).status().code(),
            absl::StatusCode::kAlreadyExists);
}

// Hands out what the test tells it to.
class ScriptedListener final : public Listener {
 public:
  ScriptedListener() {
    std::array<int, 2> pair{};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
    readable_ = FileDescriptor(pair[0]);
    writer_ = FileDescriptor(pair[1]);
  }
  const Endpoint& endpoint() const override { return endpoint_; }
  int poll_fd() const override { return readable_.get(); }
  absl::StatusOr<FileDescriptor> Accept() override {
    if (answers_.empty()) {
      char byte = 0;
      recv(readable_.get(), &byte, 1, MSG_DONTWAIT);
      return absl::UnavailableError("nobody waits");
    }
    absl::StatusOr<FileDescriptor> answer = std::move(answers_.front());
    answers_.erase(answers_.begin());
    return answer;
  }
  // Before the loop starts. Returns the other end of the connection.
  FileDescriptor AddConnection() {
    std::array<int, 2> pair{};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
    answers_.emplace_back(FileDescriptor(pair[0]));
    return FileDescriptor(pair[1]);
  }
  void AddExhaustion() { answers_.emplace_back(absl::ResourceExhaustedError("no descriptors")); }
  void Wake() { EXPECT_EQ(send(writer_.get(), "x", 1, 0), 1); }

 private:
  const Endpoint endpoint_;
  FileDescriptor readable_;
  FileDescriptor writer_;
  std::vector<absl::StatusOr<FileDescriptor>> answers_;
};

// Closed by the other side, by now or soon.
bool IsClosed(const FileDescriptor& connection) {
  char byte = 0;
  return recv(connection.get(), &byte, 1, 0) <= 0;
}

TEST(AcceptLoopTest, ShedsOneConnectionWhenDescriptorsRunOut) {
  auto listener = std::make_unique<ScriptedListener>();
  const FileDescriptor first = listener->AddConnection();
  listener->AddExhaustion();
  const FileDescriptor shed = listener->AddConnection();
  const FileDescriptor last = listener->AddConnection();
  listener->Wake();
  std::vector<std::unique_ptr<Listener>> listeners;
  listeners.push_back(std::move(listener));
  std::promise<void> two_delivered;
  std::vector<FileDescriptor> delivered;
  FakeClock clock;
  AcceptLoop loop(std::move(listeners), {.total = 10}, &clock,
                  [&](size_t index, FileDescriptor connection) {
                    EXPECT_EQ(index, 0U);
                    delivered.push_back(std::move(connection));
                    if (delivered.size() == 2) two_delivered.set_value();
                  });
  two_delivered.get_future().wait();
  EXPECT_TRUE(IsClosed(shed));
  EXPECT_EQ(loop.shed_count(), 1U);
  EXPECT_EQ(loop.accepted_count(), 2U);
  EXPECT_EQ(send(last.get(), "x", 1, 0), 1);
  char byte = 0;
  EXPECT_EQ(recv(delivered[1].get(), &byte, 1, 0), 1);
  loop.Stop();
}

TEST(ConnectionTableTest, FindsOutWhichConnectionsAreGone) {
  ConnectionTable table({.total = 2});
  std::array<int, 2> pair{};
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()), 0);
  FileDescriptor a(pair[0]);
  FileDescriptor b(pair[1]);
  EXPECT_TRUE(table.HasRoom("", 0));
  table.Add(a.get(), "");
  table.Add(b.get(), "");
  EXPECT_FALSE(table.HasRoom("", 0));
  // The descriptor's number lives on as another file: the connection is gone all the same.
  ASSERT_EQ(dup2(STDERR_FILENO, a.get()), a.get());
  // A full table is not searched again at once.
  EXPECT_FALSE(table.HasRoom("", 1));
  EXPECT_TRUE(table.HasRoom("", 1'000'000'000));
  table.Add(b.get(), "");
  EXPECT_FALSE(table.HasRoom("", 2'000'000'000));
}

TEST(ConnectionTableTest, OneHostDoesNotTakeAllPlaces) {
  ConnectionTable table({.total = 3, .per_host = 1});
  std::array<int, 2> pair{};
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()), 0);
  FileDescriptor a(pair[0]);
  const FileDescriptor b(pair[1]);
  EXPECT_TRUE(table.HasRoom("10.0.0.1", 0));
  table.Add(a.get(), "10.0.0.1");
  EXPECT_FALSE(table.HasRoom("10.0.0.1", 0));
  EXPECT_TRUE(table.HasRoom("10.0.0.2", 1));
  // Those without a host are bounded by the total alone.
  table.Add(b.get(), "");
  EXPECT_TRUE(table.HasRoom("", 1));
  a = FileDescriptor();
  EXPECT_TRUE(table.HasRoom("10.0.0.1", 1'000'000'000));
}

// Connections as the system makes them.
TEST_F(TransportTest, ConnectionsOfOneAddressAreBounded) {
  absl::StatusOr<std::unique_ptr<Listener>> listener =
      SystemTransport()->Listen(*ParseEndpoint("127.0.0.1:0"));
  ASSERT_TRUE(listener.ok()) << listener.status();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons((*listener)->endpoint().port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::vector<std::unique_ptr<Listener>> listeners;
  listeners.push_back(*std::move(listener));
  std::vector<FileDescriptor> delivered;
  FakeClock clock;
  AcceptLoop loop(std::move(listeners), {.total = 10, .per_host = 2}, &clock,
                  [&](size_t /*index*/, FileDescriptor connection) {
                    delivered.push_back(std::move(connection));
                  });
  std::vector<FileDescriptor> clients;
  for (int i = 0; i < 3; ++i) {
    clients.emplace_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(clients[i].get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  EXPECT_TRUE(IsClosed(clients[2]));
  loop.Stop();
  EXPECT_EQ(loop.accepted_count(), 2U);
  EXPECT_EQ(loop.shed_count(), 1U);
}

}  // namespace
}  // namespace kvservice::testing
