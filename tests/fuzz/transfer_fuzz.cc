// Messages of a transfer as a source sends them, in front of a real engine: each is taken or
// refused with a reason, no sequence comes of anything but a whole and right transfer, and nothing
// stays behind when it is given up.
//
// Input: messages, each after its length (16 bits, little endian). A head that is no head is sent
// as the right one of a small sequence, so that what follows it is looked at.

#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <utility>

#include "kvservice/server/convert_transfer.h"
#include "kvservice/transfer.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

// One block, so that a message may hold it.
constexpr uint32_t kLength = 9;
constexpr int kMessagesMax = 16;

void Expect(bool condition) {
  if (!condition) std::abort();
}

class Fixture {
 public:
  Fixture() {
    handle_ = engine_.NewSequence();
    engine_.Fill(handle_, 0, Counting(0, kLength));
    std::promise<std::string> head;
    engine_.get()->Send(kTenant, handle_.id, handle_.generation, {},
                        [&](const absl::StatusOr<TransferPart>& part) {
                          head.set_value(std::get<TransferBegin>(*part).head);
                        });
    head_ = head.get_future().get();
    used_bytes_ = engine_.get()->Stats().pool_bytes_used;
  }

  void Run(FuzzInput input) {
    TransferAttempt attempt;
    for (int i = 0; i < kMessagesMax; ++i) {
      const std::string bytes = input.TakeBytes(input.Take<uint16_t>());
      v1::ReceiveRequest message;
      if (bytes.empty() || !message.ParseFromString(bytes)) break;
      if (message.has_begin() && !ReadTransferHead(message.begin().head()).has_value()) {
        message.mutable_begin()->set_head(head_);
      }
      absl::StatusOr<TransferPart> part = PartFromProto(&message);
      Expect(part.ok() || absl::IsInvalidArgument(part.status()));
      if (!part.ok()) continue;
      const bool begins = std::holds_alternative<TransferBegin>(*part);
      const auto reply = Give(attempt, *std::move(part));
      if (!reply.ok()) {
        Expect(!reply.status().message().empty());
        Expect(reply.status().code() != absl::StatusCode::kInternal);
        continue;
      }
      // Nobody but the source knows the checksums of that sequence, or has another one.
      Expect(!reply->sequence.has_value() || reply->sequence->length_max == 0);
      if (begins) attempt = reply->attempt;
      v1::ReceiveResponse response;
      ReplyToProto(*reply, &response);
      Expect(ReplyFromProto(response).ok());
    }
    Clear(attempt);
  }

 private:
  absl::StatusOr<ReceiveReply> Give(const TransferAttempt& attempt, TransferPart part) {
    std::promise<absl::StatusOr<ReceiveReply>> reply;
    engine_.get()->Receive(
        kTenant, attempt, std::move(part),
        [&](absl::StatusOr<ReceiveReply> got) { reply.set_value(std::move(got)); });
    return reply.get_future().get();
  }

  void Clear(const TransferAttempt& attempt) {
    Expect(Give(attempt, TransferEnd{.gives_up = true}).ok());
    // Those of other heads, and empty sequences that were whole. The source's stays.
    Expect(engine_.RenewLease(handle_, 0).ok());
    engine_.clock.AdvanceMs(TestEngine::SmallOptions().receive_idle_ms);
    for (const SequenceInfo& info : engine_.List("")) {
      if (info.length_max == 0) Expect(engine_.Drop({info.id, info.generation}).ok());
    }
    engine_.List("");
    Expect(engine_.get()->Stats().pool_bytes_used == used_bytes_);
  }

  TestEngine engine_;
  Handle handle_;
  std::string head_;
  size_t used_bytes_ = 0;
};

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* const kFixture = new kvservice::testing::Fixture;
  kFixture->Run(kvservice::testing::FuzzInput(data, size));
  return 0;
}
