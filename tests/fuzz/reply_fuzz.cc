// Replies of Attend, as a client reads them: where their columns lie, and as what protobuf makes of
// the message, which must say the same. Tensors are in the message or in a region beside it.
//
// Input: the message.

#include <google/protobuf/arena.h>
#include <google/protobuf/stubs/logging.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "client/replies.h"
#include "client/status.h"
#include "tests/client/made_reply.h"
#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

constexpr uint64_t kRegionOffset = 64;
constexpr size_t kRegionBytes = 256;

void Expect(bool condition) {
  if (!condition) std::abort();
}

void Run(const std::string& message) {
  const google::protobuf::LogSilencer silence;
  static const auto* const kRequest = new v1::AttendRequest(MadeRequest());
  const std::vector<std::byte> memory(kRegionBytes);
  const client::ReplyRegion region = {.offset = kRegionOffset, .bytes = memory};
  google::protobuf::Arena arena;
  const auto result = client::ResultFromMessage(*kRequest, message, region, &arena,
                                                client::PrepareResult(*kRequest, true));
  v1::AttendResponse response;
  if (response.ParseFromString(message)) {
    Expect(TextOf(result) == TextOf(client::ResultFromProto(*kRequest, response, region)));
  } else {
    Expect(client::FieldOf(result.status()) == "message");
  }
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run({reinterpret_cast<const char*>(data), size});
  return 0;
}
