// Requests in a lane's memory, in front of a real engine: whatever a client writes there is
// answered with a message that it can read, and the server lives on.
//
// Input: flags, then what they ask for (method, offset and length of the message), then the
// message. The sequence that exists is named by kPlaceholder.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "kvservice/server/lane.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/error_details.pb.h"
#include "kvservice/v1/sequence.pb.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

constexpr wire::LaneShape kShape = {.slot_count = 1, .request_bytes = 65536, .reply_bytes = 65536};
constexpr uint64_t kMessageOffset = 32768;
constexpr char kPlaceholder[] = "0123456789abcdef";
constexpr size_t kIdBytes = 16;
constexpr uint32_t kLength = 100;

class OpenGate final : public CallGate {
 public:
  Caller Identify(const grpc::ServerContext& /*context*/) override { return LocalCaller("nobody"); }
  absl::Status Allow(const MethodAccess& method, const Caller& caller) override {
    return CheckAccess(method, caller);
  }
  absl::Status Admit(const MethodAccess& method, const Caller& caller) override {
    return Allow(method, caller);
  }
  void Ended(const CallRecord& /*record*/) override {}
};

class Fixture {
 public:
  Fixture()
      : file_(wire::NewSealedMemory(bytes())),
        mine_(wire::SharedMemory::Map(file_.get(), bytes())),
        memory_(mine_.bytes(), kShape),
        host_{.service = {.calls = {.gate = &gate_, .in_flight = &in_flight_, .clock = &clock_},
                          .engine = engine_.get(),
                          .policies = &policies_},
              .wake = [] {}},
        lane_(std::make_shared<Lane>(&host_, kTenant, wire::SharedMemory::Map(file_.get(), bytes()),
                                     kShape)) {
    const Handle handle = engine_.NewSequence();
    engine_.Fill(handle, 0, Counting(0, kLength));
    id_ = handle.id;
    // Numbers that are finite in every type, wherever a tensor lies.
    const absl::Span<std::byte> area =
        memory_.Range(memory_.RequestOffset(0), kShape.request_bytes);
    for (size_t i = 0; i < area.size(); i += 2) {
      area[i] = std::byte{0x80};
      area[i + 1] = std::byte{0x3c};
    }
  }

  void Run(const uint8_t* data, size_t size) {
    FuzzInput input(data, size);
    const auto flags = input.Take<uint8_t>();
    const uint64_t place = memory_.RequestOffset(0) + kMessageOffset;
    wire::SlotHead* const head = memory_.slot(0);
    uint32_t method = flags & 1U ? wire::kLaneAppend : wire::kLaneAttend;
    if (flags & 2U) method = input.Take<uint32_t>();
    const uint64_t offset = flags & 4U ? input.Take<uint64_t>() : place;
    const auto wanted_bytes = flags & 8U ? std::optional(input.Take<uint32_t>()) : std::nullopt;
    std::string message = input.Rest().substr(0, kShape.request_bytes - kMessageOffset);
    for (size_t at = 0; (at = message.find(kPlaceholder, at)) != std::string::npos;) {
      std::memcpy(&message[at], id_.bytes.data(), kIdBytes);
    }
    std::memcpy(memory_.Range(place, message.size()).data(), message.data(), message.size());
    head->request_method = method;
    head->request_offset = offset;
    head->request_bytes = wanted_bytes.value_or(static_cast<uint32_t>(message.size()));
    wire::Store(&head->request_number, ++number_);
    while (wire::Load(head->reply_number) != number_) {
      if (!lane_->TakeRequests()) std::this_thread::yield();
    }
    CheckReply(method);
  }

 private:
  static size_t bytes() { return wire::LaneBytes(kShape).value(); }

  void CheckReply(uint32_t method) const {
    const wire::SlotHead& head = *memory_.slot(0);
    if (head.reply_offset < memory_.ReplyOffset(0) ||
        !wire::IsRange(head.reply_offset, head.reply_bytes,
                       memory_.ReplyOffset(0) + kShape.reply_bytes)) {
      std::abort();
    }
    const absl::Span<std::byte> range = memory_.Range(head.reply_offset, head.reply_bytes);
    const auto parses = [&](google::protobuf::MessageLite&& reply) {
      return reply.ParseFromArray(range.data(), static_cast<int>(range.size()));
    };
    const bool is_right = head.reply_code != 0          ? parses(v1::Status())
                          : method == wire::kLaneAppend ? parses(v1::AppendResponse())
                                                        : parses(v1::AttendResponse());
    if (!is_right) std::abort();
  }

  TestEngine engine_;
  FakeClock clock_;
  OpenGate gate_;
  InFlight in_flight_{size_t{1} << 30};
  LivePolicies policies_{PolicyRegistry()};
  FileDescriptor file_;
  wire::SharedMemory mine_;
  wire::LaneMemory memory_;
  LaneHost host_;
  std::shared_ptr<Lane> lane_;
  SequenceId id_;
  uint32_t number_ = 0;
};

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Never deleted: it lives as long as the process.
  static auto* const kFixture = new kvservice::testing::Fixture;
  kFixture->Run(data, size);
  return 0;
}
