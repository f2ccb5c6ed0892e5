#include "tests/client/kvctl_run.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <sstream>

namespace kvservice::testing {

Outcome RunKvctl(const std::string& environment, const std::string& arguments) {
  const TemporaryFolder folder;
  const char* const bin = std::getenv("KVSERVICE_BIN_DIR");
  EXPECT_NE(bin, nullptr);
  const std::string err_path = folder.path() + "/stderr";
  const std::string line = environment + " '" + std::string(bin == nullptr ? "." : bin) +
                           "/kvctl' " + arguments + " </dev/null 2>'" + err_path + "'";
  Outcome outcome;
  FILE* const pipe = popen(line.c_str(), "r");
  EXPECT_NE(pipe, nullptr);
  char buffer[4096];
  for (size_t count = 0; (count = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) {
    outcome.out.append(buffer, count);
  }
  const int status = pclose(pipe);
  outcome.exit = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  std::ostringstream err;
  err << std::ifstream(err_path).rdbuf();
  outcome.err = err.str();
  return outcome;
}

std::string EnvironmentOf(const ServedEngine& served) {
  return "KVCTL_ENDPOINT='unix:" + served.folder() +
         "/data' KVCTL_ADMIN_ENDPOINT='unix:" + served.folder() + "/admin'";
}

Handle NewHandle(const ServedEngine& served) {
  std::promise<Handle> created;
  CreateOptions options;
  options.model = kModel;
  served.engine()->Create(ListenAddress::kDefaultTenant, options,
                          [&](const absl::StatusOr<SequenceInfo>& info) {
                            EXPECT_TRUE(info.ok()) << info.status();
                            created.set_value({.id = info->id, .generation = info->generation});
                          });
  return created.get_future().get();
}

std::string MakeSequence(const ServedEngine& served) {
  const std::string tenant = ListenAddress::kDefaultTenant;
  const Handle handle = NewHandle(served);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const AppendStep append(served.model(), handle, layer, 0, Counting(0, 99), tenant);
    EXPECT_TRUE(append.Run(served.engine()).ok());
    AttendStep attend(served.model(), layer, tenant);
    EXPECT_TRUE(attend.Add(handle, 99, {99}).Run(served.engine()).ok());
  }
  return HexOf(handle.id);
}

ServedEngineOptions WithWrongBounds() {
  auto device = std::make_unique<WatchedDevice>(*NewDevice("reference", {}));
  device->set_after([](const LayerShape&, absl::Span<AttendRow> rows) {
    if (rows[0].plan.prove == Guarantee::kExact) return;
    for (uint32_t head = 0; head < 4; ++head) {
      HeadCertificate* certificate = &rows[0].certificates[head];
      certificate->level = Level::kDeterministic;
      certificate->dropped_mass_upper.value = certificate->dropped_mass_lower.value * 0.999;
    }
  });
  ServedEngineOptions options;
  options.engine.audit_rate = 1.0;
  options.device = std::move(device);
  return options;
}

std::string MakeWronglyBounded(const ServedEngine& served) {
  const std::string tenant = ListenAddress::kDefaultTenant;
  const Handle handle = NewHandle(served);
  const AppendStep append(served.model(), handle, 0, 0, Counting(0, 300), tenant);
  EXPECT_TRUE(append.Run(served.engine()).ok());
  Policy policy = DefaultPolicy(SelectorKind::kCertified);
  policy.guarantee = Guarantee::kDeterministic;
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  AttendStep attend(served.model(), 0, tenant);
  attend.Add(handle, 300, {300});
  attend.call.policy = &policy;
  EXPECT_TRUE(attend.Run(served.engine()).ok());
  return HexOf(handle.id);
}

std::string HexOf(const SequenceId& id) {
  std::string hex;
  for (const std::byte byte : id.bytes) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", std::to_integer<unsigned>(byte));
    hex += digits;
  }
  return hex;
}

}  // namespace kvservice::testing
