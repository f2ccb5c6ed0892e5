// Numbers, times, ids and addresses as people write them, for kvctl and for the server's flags:
// what is understood is written again as text that means the same.

#include <cmath>
#include <cstdlib>
#include <string>

#include "client/kvctl/text.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/quantity.h"
#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

void Expect(bool condition) {
  if (!condition) std::abort();
}

void RunServer(const std::string& text) {
  if (const auto bytes = ParseBytes(text)) Expect(ParseBytes(BytesText(*bytes)) == bytes);
  if (const auto time = ParseMilliseconds(text)) {
    Expect(ParseMilliseconds(MillisecondsText(*time)) == time);
  }
  const absl::StatusOr<Endpoint> endpoint = ParseEndpoint(text);
  if (endpoint.ok()) {
    const absl::StatusOr<Endpoint> again = ParseEndpoint(endpoint->ToString());
    Expect(again.ok() && again->ToString() == endpoint->ToString());
    Expect(again->IsLocal() == endpoint->IsLocal());
  } else {
    Expect(!endpoint.status().message().empty());
  }
  const absl::StatusOr<ListenAddress> address = ParseListenAddress(text);
  if (address.ok()) Expect(!address->tenant.empty() && address->tenant.size() <= 64);
}

void RunKvctl(const std::string& text) {
  if (const auto id = client::IdOfHex(text)) {
    Expect(id->size() == 16 && client::IdOfHex(client::HexOfId(*id)) == id);
  }
  if (const auto duration = client::ParseDuration(text)) {
    Expect(duration->count() > 0 && *duration <= std::chrono::hours(24));
  }
  for (const int base : {10, 16}) {
    const auto number = client::ParseNumber(text, base);
    if (number.has_value() && base == 10) {
      Expect(client::ParseNumber(std::to_string(*number), base) == number);
    }
    if (!number.has_value()) continue;
    Expect(!client::BytesText(*number).empty() && !client::DurationText(*number).empty());
    Expect(!client::ShareText(*number, UINT64_MAX).empty());
  }
}

// A bound that is shown is still a bound.
void RunNumber(double bound) {
  const std::string shown = client::UpperText(bound);
  Expect(!shown.empty());
  if (std::isfinite(bound) && bound >= 0.0) Expect(std::strtod(shown.c_str(), nullptr) >= bound);
  const auto number = static_cast<float>(bound);
  if (std::isfinite(number)) {
    Expect(std::strtof(client::ShortText(number).c_str(), nullptr) == number);
  }
}

void Run(FuzzInput input) {
  const auto kind = input.Take<uint8_t>();
  if (kind % 3 == 0) return RunServer(input.Rest());
  if (kind % 3 == 1) return RunKvctl(input.Rest());
  RunNumber(input.Take<double>());
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run(kvservice::testing::FuzzInput(data, size));
  return 0;
}
