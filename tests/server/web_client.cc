#include "tests/server/web_client.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/numbers.h"
#include "kvservice/server/transport.h"

namespace kvservice::testing {

std::string AnswerTo(const Endpoint& endpoint, const std::string& request) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(endpoint.port);
  EXPECT_EQ(inet_pton(AF_INET, endpoint.host.c_str(), &address.sin_addr), 1);
  const FileDescriptor connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(connect(connection.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_EQ(write(connection.get(), request.data(), request.size()),
            static_cast<ssize_t>(request.size()));
  std::string answer;
  char buffer[4096];
  for (ssize_t count = 0; (count = read(connection.get(), buffer, sizeof(buffer))) > 0;) {
    answer.append(buffer, static_cast<size_t>(count));
  }
  return answer;
}

std::string GetPage(const Endpoint& endpoint, const std::string& path) {
  return AnswerTo(endpoint, "GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n");
}

std::optional<double> MetricOf(const std::string& page, const std::string& name) {
  const std::string before = "\n" + name + " ";
  const size_t found = page.find(before);
  if (found == std::string::npos) return std::nullopt;
  const size_t begin = found + before.size();
  const std::string text = page.substr(begin, page.find('\n', begin) - begin);
  double value = 0.0;
  if (!absl::SimpleAtod(text, &value)) return std::nullopt;
  return value;
}

}  // namespace kvservice::testing
