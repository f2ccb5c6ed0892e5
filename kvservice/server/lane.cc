#include "kvservice/server/lane.h"

#include <google/protobuf/arena.h>

#include <atomic>
#include <optional>
#include <utility>

#include "kvservice/error.h"
#include "kvservice/server/attend_run.h"
#include "kvservice/server/region_copy.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

using google::protobuf::Arena;

uint64_t AlignUp(uint64_t offset) {
  return (offset + wire::kLaneAlignment - 1) / wire::kLaneAlignment * wire::kLaneAlignment;
}

absl::Status MessageOutOfRange(uint64_t offset, uint32_t bytes, const wire::LaneShape& shape) {
  return InvalidField("request_offset", "LANE_RANGE_INVALID",
                      "the slot's request_offset " + std::to_string(offset) +
                          " and request_bytes " + std::to_string(bytes) + " do not name at most " +
                          std::to_string(shape.request_bytes) + " bytes of the lane's memory");
}

absl::Status ReplyTooLarge(uint64_t bytes, uint64_t bytes_max) {
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      "the reply needs " + std::to_string(bytes) + " bytes of the slot's " +
          std::to_string(bytes_max),
      {.reason = "REPLY_TOO_LARGE",
       .field = {},
       .metadata = {{"bytes", std::to_string(bytes)}, {"bytes_max", std::to_string(bytes_max)}}});
}

// Of a slot, for the messages of a call: those of 8 rows and 32 heads fit.
constexpr size_t kArenaBytes = size_t{64} << 10;

google::protobuf::ArenaOptions OptionsOf(absl::Span<char> block) {
  google::protobuf::ArenaOptions options;
  options.initial_block = block.data();
  options.initial_block_size = block.size();
  return options;
}

// A call in a slot. The block is borrowed.
struct LaneCall {
  explicit LaneCall(absl::Span<char> block) : arena(OptionsOf(block)) {}

  Arena arena;
  v1::AttendRequest* const request = Arena::CreateMessage<v1::AttendRequest>(&arena);
  v1::AttendResponse* const response = Arena::CreateMessage<v1::AttendResponse>(&arena);
  AttendRun run;
  size_t reserved_bytes = 0;
};

}  // namespace

struct Lane::Slot {
  Slot(absl::Span<const std::byte> memory, size_t request_bytes) : region(memory, request_bytes) {}

  // The call is the engine's thread's.
  std::atomic<bool> is_busy{false};
  // Of whoever has the slot. The number of the last request that was taken:
  uint32_t number = 0;
  // A private copy of the message, in either direction.
  std::string message;
  RegionCopy region;
  // Kept from call to call, so that decoding allocates and clears no large buffers.
  const std::unique_ptr<char[]> arena = std::make_unique_for_overwrite<char[]>(kArenaBytes);
  std::vector<float> out;
  std::vector<float> lse;
  std::optional<LaneCall> call;
};

Lane::Lane(const LaneHost* host, std::string tenant, wire::SharedMemory memory,
           const wire::LaneShape& shape)
    : host_(host),
      tenant_(std::move(tenant)),
      mapping_(std::move(memory)),
      memory_(mapping_.bytes(), shape) {
  for (uint32_t i = 0; i < shape.slot_count; ++i) {
    slots_.emplace_back(mapping_.bytes(), shape.request_bytes);
  }
}

Lane::~Lane() = default;

bool Lane::TakeRequests() {
  bool any = false;
  for (uint32_t i = 0; i < memory_.shape().slot_count; ++i) any = Take(i) || any;
  return any;
}

bool Lane::HasRequests() const {
  for (uint32_t i = 0; i < memory_.shape().slot_count; ++i) {
    const Slot& slot = slots_[i];
    if (!slot.is_busy && wire::Load(memory_.slot(i)->request_number) != slot.number) return true;
  }
  return false;
}

void Lane::SetAsleep(bool asleep) const {
  wire::Store(&memory_.head()->server_asleep, uint32_t{asleep});
}

bool Lane::Take(uint32_t index) {
  Slot& slot = slots_[index];
  if (slot.is_busy) return false;
  const uint32_t number = wire::Load(memory_.slot(index)->request_number);
  if (number == slot.number) return false;
  slot.number = number;
  slot.is_busy = true;
  slot.call.emplace(absl::MakeSpan(slot.arena.get(), kArenaBytes));
  slot.call->run.call.out = std::move(slot.out);
  slot.call->run.call.lse = std::move(slot.lse);
  slot.call->run.arrived_ns = host_->service.calls.clock->SteadyNowNs();
  host_->service.calls.in_flight->Enter();
  const absl::Status status = Begin(index);
  if (!status.ok()) {
    Reply(index, status);
    return true;
  }
  AttendCall* const call = &slot.call->run.call;
  call->done = [lane = shared_from_this(), index](const absl::Status& done) {
    lane->Reply(index, done);
  };
  host_->service.engine->Attend(call);
  return true;
}

absl::Status Lane::Begin(uint32_t index) {
  Slot& slot = slots_[index];
  if (absl::Status admitted = host_->service.calls.gate->Admit(); !admitted.ok()) return admitted;
  absl::Status status = CopyMessage(index);
  if (!status.ok()) return status;
  v1::AttendRequest* const request = slot.call->request;
  if (!request->ParseFromString(slot.message)) return MessageMalformed(*request);
  slot.region.Clear();
  return PrepareAttend(*request, *host_->service.policies, tenant_, &slot.region, &slot.call->run);
}

absl::Status Lane::CopyMessage(uint32_t index) {
  Slot& slot = slots_[index];
  const wire::SlotHead& head = *memory_.slot(index);
  const uint64_t offset = wire::Load(head.request_offset);
  const uint32_t bytes = wire::Load(head.request_bytes);
  const wire::LaneShape& shape = memory_.shape();
  if (bytes > shape.request_bytes || !wire::IsRange(offset, bytes, memory_.all().size())) {
    return MessageOutOfRange(offset, bytes, shape);
  }
  if (!host_->service.calls.in_flight->Reserve(bytes)) return RequestBytesExhausted();
  slot.call->reserved_bytes = bytes;
  const absl::Span<const std::byte> range = memory_.Range(offset, bytes);
  slot.message.assign(reinterpret_cast<const char*>(range.data()), range.size());
  return absl::OkStatus();
}

void Lane::Reply(uint32_t index, const absl::Status& status) {
  Slot& slot = slots_[index];
  wire::SlotHead* const head = memory_.slot(index);
  const absl::Status answer = status.ok() ? WriteAnswer(index) : status;
  if (!answer.ok()) WriteError(index, answer);
  wire::Store(&head->reply_number, slot.number);
  if (wire::Load(head->client_asleep) != 0) wire::Wake(&head->reply_number);

  const CallHost& calls = host_->service.calls;
  const uint64_t duration_ns = calls.clock->SteadyNowNs() - slot.call->run.arrived_ns;
  const size_t reserved_bytes = slot.call->reserved_bytes;
  const uint32_t number = slot.number;
  slot.out = std::move(slot.call->run.call.out);
  slot.lse = std::move(slot.call->run.call.lse);
  slot.call.reset();
  slot.is_busy = false;
  // The lane thread may have passed by the next request while the slot was still busy.
  if (wire::Load(head->request_number) != number) host_->wake();
  calls.gate->Ended("Attend", tenant_, answer, duration_ns);
  calls.in_flight->Leave(reserved_bytes);
}

absl::Status Lane::WriteAnswer(uint32_t index) {
  Slot& slot = slots_[index];
  v1::AttendResponse* const response = slot.call->response;
  const AttendRun& run = slot.call->run;
  DescribeAttend(*slot.call->request, run, host_->service.calls.clock, response);
  v1::Tensor* const lse = response->mutable_lse();
  v1::Tensor* const out = response->mutable_out();
  DescribeOutputs(run, lse, out);
  const uint64_t lse_offset = memory_.ReplyOffset(index);
  const uint64_t lse_bytes = run.call.lse.size() * sizeof(float);
  const uint64_t out_offset = AlignUp(lse_offset + lse_bytes);
  const uint64_t out_bytes = run.call.out.size() * ElementBytes(run.output_dtype);
  lse->mutable_region()->set_offset_bytes(lse_offset);
  lse->mutable_region()->set_length_bytes(lse_bytes);
  out->mutable_region()->set_offset_bytes(out_offset);
  out->mutable_region()->set_length_bytes(out_bytes);
  const uint64_t offset = AlignUp(out_offset + out_bytes);
  const size_t message_bytes = response->ByteSizeLong();
  const uint64_t bytes = offset + message_bytes - lse_offset;
  if (bytes > memory_.shape().reply_bytes) {
    return ReplyTooLarge(bytes, memory_.shape().reply_bytes);
  }
  std::memcpy(memory_.Range(lse_offset, lse_bytes).data(), run.call.lse.data(), lse_bytes);
  StoreOutput(run.output_dtype, run.call.out, memory_.Range(out_offset, out_bytes).data());
  // Not into the shared memory: what serializing does there is protobuf's business.
  slot.message.resize(message_bytes);
  response->SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(slot.message.data()));
  WriteMessage(index, 0, offset, slot.message);
  return absl::OkStatus();
}

void Lane::WriteError(uint32_t index, const absl::Status& status) {
  v1::Status error = StatusToProto(status);
  if (error.ByteSizeLong() > memory_.shape().reply_bytes) error.clear_details();
  WriteMessage(index, static_cast<uint32_t>(status.code()), memory_.ReplyOffset(index),
               error.SerializeAsString());
}

void Lane::WriteMessage(uint32_t index, uint32_t code, uint64_t offset,
                        const std::string& message) {
  std::memcpy(memory_.Range(offset, message.size()).data(), message.data(), message.size());
  wire::SlotHead* const head = memory_.slot(index);
  wire::Store(&head->reply_code, code);
  wire::Store(&head->reply_offset, offset);
  wire::Store(&head->reply_bytes, static_cast<uint32_t>(message.size()));
}

}  // namespace kvservice
