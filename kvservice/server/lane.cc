#include "kvservice/server/lane.h"

#include <google/protobuf/arena.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "kvservice/error.h"
#include "kvservice/server/attend_reply.h"
#include "kvservice/server/attend_run.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/region_copy.h"
#include "kvservice/server/status.h"
#include "kvservice/tensor_check.h"

namespace kvservice {
namespace {

using google::protobuf::Arena;

// In the order of a client's calls, whose numbers come round.
bool IsBefore(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) < 0; }

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

absl::Status MethodUnknown(uint32_t method) {
  return InvalidField("request_method", "LANE_METHOD_UNKNOWN",
                      "the slot's request_method is " + std::to_string(method) + ", expected " +
                          std::to_string(wire::kLaneAttend) + " (Attend) or " +
                          std::to_string(wire::kLaneAppend) + " (Append)");
}

// Of a slot, for the messages of a call: those of 8 rows and 32 heads fit.
constexpr size_t kArenaBytes = size_t{64} << 10;
// Of a row of a reply; one with lists of positions may have megabytes.
constexpr size_t kRowBytesKept = size_t{64} << 10;

google::protobuf::ArenaOptions OptionsOf(absl::Span<char> block) {
  google::protobuf::ArenaOptions options;
  options.initial_block = block.data();
  options.initial_block_size = block.size();
  return options;
}

// Nothing if the shape of q is not one that the engine takes.
std::optional<wire::ReplyPlaces> LayOut(uint64_t begin, absl::Span<const int64_t> q_shape,
                                        DType dtype) {
  if (q_shape.size() != 3) return std::nullopt;
  const std::optional<size_t> lse_bytes = TensorBytes(DType::kFloat32, q_shape.first(2));
  const std::optional<size_t> out_bytes = TensorBytes(dtype, q_shape);
  if (!lse_bytes.has_value() || !out_bytes.has_value()) return std::nullopt;
  return wire::PlaceReply(begin, *lse_bytes, *out_bytes);
}

// A call in a slot; the messages are of its method. The block is borrowed.
struct LaneCall {
  explicit LaneCall(absl::Span<char> block) : arena(OptionsOf(block)) {}

  Arena arena;
  // Of the thread that answers: what a thread takes from another's arena is not of its block.
  std::optional<Arena> reply_arena;
  uint32_t method = 0;
  v1::AttendRequest* request = nullptr;
  v1::AppendRequest* append = nullptr;
  AttendRun run;
  bool was_duplicate = false;  // an append's tokens
  uint64_t arrived_ns = 0;
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
  const std::unique_ptr<char[]> reply_arena = std::make_unique_for_overwrite<char[]>(kArenaBytes);
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<AttendRowResult> results;
  std::vector<std::string> row_bytes;
  std::optional<LaneCall> call;
};

Lane::Lane(const LaneHost* host, std::string tenant, wire::SharedMemory memory,
           const wire::LaneShape& shape)
    : host_(host),
      caller_(LocalCaller(std::move(tenant))),
      attend_access_(AccessOf("kvservice.v1.AttentionService.Attend")),
      append_access_(AccessOf("kvservice.v1.SequenceService.Append")),
      mapping_(std::move(memory)),
      memory_(mapping_.bytes(), shape) {
  for (uint32_t i = 0; i < shape.slot_count; ++i) {
    slots_.emplace_back(mapping_.bytes(), shape.request_bytes);
  }
}

Lane::~Lane() = default;

bool Lane::TakeRequests() {
  bool any = false;
  std::optional<uint32_t> last_append;
  for (uint32_t i = 0; i < memory_.shape().slot_count; ++i) {
    const std::optional<Request> request = Look(i);
    if (!request.has_value()) continue;
    any = true;
    if (request->method != wire::kLaneAppend) {
      Take(*request);
    } else if (!last_append.has_value() || IsBefore(*last_append, request->order)) {
      last_append = request->order;
    }
  }
  if (last_append.has_value()) TakeAppends(*last_append);
  return any;
}

bool Lane::HasRequests() const {
  for (uint32_t i = 0; i < memory_.shape().slot_count; ++i) {
    if (Look(i).has_value()) return true;
  }
  return false;
}

void Lane::SetAsleep(bool asleep) const {
  wire::Store(&memory_.head()->server_asleep, uint32_t{asleep});
}

std::optional<Lane::Request> Lane::Look(uint32_t index) const {
  const Slot& slot = slots_[index];
  if (slot.is_busy) return std::nullopt;
  const wire::SlotHead& head = *memory_.slot(index);
  const uint32_t number = wire::Load(head.request_number);
  if (number == slot.number) return std::nullopt;
  return Request{.index = index,
                 .number = number,
                 .method = wire::Load(head.request_method),
                 .order = wire::Load(head.request_order)};
}

// Whatever was there before `last` is there by now too, also where the first look came too early
// for it; what came after it may have gaps and is left to the next time.
void Lane::TakeAppends(uint32_t last) {
  absl::InlinedVector<Request, wire::kLaneSlotsMax> appends;
  for (uint32_t i = 0; i < memory_.shape().slot_count; ++i) {
    const std::optional<Request> request = Look(i);
    if (request.has_value() && request->method == wire::kLaneAppend &&
        !IsBefore(last, request->order)) {
      appends.push_back(*request);
    }
  }
  // Distances from one number: whatever a client makes of them, they have an order.
  std::sort(appends.begin(), appends.end(),
            [last](const Request& a, const Request& b) { return last - a.order > last - b.order; });
  for (const Request& request : appends) Take(request);
}

void Lane::Take(const Request& request) {
  Slot& slot = slots_[request.index];
  slot.number = request.number;
  slot.is_busy = true;
  slot.call.emplace(absl::MakeSpan(slot.arena.get(), kArenaBytes));
  slot.call->run.call.out = std::move(slot.out);
  slot.call->run.call.lse = std::move(slot.lse);
  slot.call->run.call.results = std::move(slot.results);
  slot.call->run.row_bytes = std::move(slot.row_bytes);
  slot.call->method = request.method;
  slot.call->arrived_ns = host_->service.calls.clock->SteadyNowNs();
  host_->service.calls.in_flight->Enter();
  const absl::Status status = Begin(request.index);
  if (!status.ok()) Reply(request.index, status);
}

// An error unless the engine has the call.
absl::Status Lane::Begin(uint32_t index) {
  CallGate* const gate = host_->service.calls.gate;
  if (absl::Status admitted = gate->Admit(AccessOfCall(index), caller_); !admitted.ok()) {
    return admitted;
  }
  absl::Status status = CopyMessage(index);
  if (!status.ok()) return status;
  slots_[index].region.Begin();
  switch (slots_[index].call->method) {
    case wire::kLaneAttend:
      return BeginAttend(index);
    case wire::kLaneAppend:
      return BeginAppend(index);
    default:
      return MethodUnknown(slots_[index].call->method);
  }
}

const MethodAccess& Lane::AccessOfCall(uint32_t index) const {
  return slots_[index].call->method == wire::kLaneAppend ? append_access_ : attend_access_;
}

absl::Status Lane::BeginAttend(uint32_t index) {
  Slot& slot = slots_[index];
  LaneCall* const call = &*slot.call;
  call->request = Arena::CreateMessage<v1::AttendRequest>(&call->arena);
  if (!call->request->ParseFromString(slot.message)) return MessageMalformed(*call->request);
  const absl::Status status = PrepareAttend(*call->request, host_->service.policies->now(),
                                            caller_.tenant, &slot.region, &call->run);
  if (!status.ok()) return status;
  PlaceOutputs(index);
  call->run.arrived_ns = call->arrived_ns;
  call->run.call.done = [lane = shared_from_this(), index](const absl::Status& done) {
    lane->Reply(index, done);
  };
  host_->service.engine->Attend(&call->run.call);
  return absl::OkStatus();
}

// Outputs that need no conversion are written where the client reads them.
void Lane::PlaceOutputs(uint32_t index) {
  AttendRun* const run = &slots_[index].call->run;
  if (run->output_dtype != DType::kFloat32) return;
  const uint64_t begin = memory_.ReplyOffset(index);
  const auto places = LayOut(begin, run->call.q.shape, run->output_dtype);
  if (!places.has_value() || places->message - begin > memory_.shape().reply_bytes) return;
  const absl::Span<std::byte> range = memory_.Range(places->out, places->out_bytes);
  run->call.out_place = {reinterpret_cast<float*>(range.data()), range.size() / sizeof(float)};
}

absl::Status Lane::BeginAppend(uint32_t index) {
  Slot& slot = slots_[index];
  LaneCall* const call = &*slot.call;
  call->append = Arena::CreateMessage<v1::AppendRequest>(&call->arena);
  if (!call->append->ParseFromString(slot.message)) return MessageMalformed(*call->append);
  absl::StatusOr<AppendCall> append = AppendFromProto(*call->append, caller_.tenant, &slot.region);
  if (!append.ok()) return append.status();
  host_->service.engine->Append(
      *std::move(append),
      [lane = shared_from_this(), index](const absl::StatusOr<AppendResult>& result) {
        if (result.ok()) lane->slots_[index].call->was_duplicate = result->duplicate;
        lane->Reply(index, result.status());
      });
  return absl::OkStatus();
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
  const bool is_append = slot.call->method == wire::kLaneAppend;
  absl::Status answer = status;
  if (status.ok()) answer = is_append ? WriteAppendAnswer(index) : WriteAnswer(index);
  if (!answer.ok()) WriteError(index, answer);

  const CallHost& calls = host_->service.calls;
  const MethodAccess& method = AccessOfCall(index);
  const uint64_t arrived_ns = slot.call->arrived_ns;
  const size_t reserved_bytes = slot.call->reserved_bytes;
  const uint32_t number = slot.number;
  slot.out = std::move(slot.call->run.call.out);
  slot.lse = std::move(slot.call->run.call.lse);
  slot.results = std::move(slot.call->run.call.results);
  slot.row_bytes = std::move(slot.call->run.row_bytes);
  for (std::string& row : slot.row_bytes) {
    if (row.capacity() > kRowBytesKept) row = std::string();
  }
  slot.call.reset();
  // Before the client can see the answer and use the slot again: a request in a slot that is busy
  // is passed by, and appends of other slots would overtake it.
  slot.is_busy = false;
  // That of a client which did not wait for the answer may have been passed by.
  if (wire::Load(head->request_number) != number) host_->wake();
  wire::Store(&head->reply_number, number);
  if (wire::Load(head->client_asleep) != 0) wire::Wake(&head->reply_number);
  calls.gate->Ended({.method = method,
                     .caller = caller_,
                     .status = answer,
                     .duration_ns = calls.clock->SteadyNowNs() - arrived_ns});
  calls.in_flight->Leave(reserved_bytes);
}

absl::Status Lane::WriteAnswer(uint32_t index) {
  Slot& slot = slots_[index];
  Arena* const arena = &slot.call->reply_arena.emplace(
      OptionsOf(absl::MakeSpan(slot.reply_arena.get(), kArenaBytes)));
  auto* const response = Arena::CreateMessage<v1::AttendResponse>(arena);
  const AttendRun& run = slot.call->run;
  DescribeAttend(*slot.call->request, run, host_->service.calls, response);
  v1::Tensor* const lse = response->mutable_lse();
  v1::Tensor* const out = response->mutable_out();
  DescribeOutputs(run, lse, out);
  // The engine has looked at the shape.
  const uint64_t begin = memory_.ReplyOffset(index);
  const wire::ReplyPlaces places = *LayOut(begin, run.call.q.shape, run.output_dtype);
  lse->mutable_region()->set_offset_bytes(places.lse);
  lse->mutable_region()->set_length_bytes(places.lse_bytes);
  out->mutable_region()->set_offset_bytes(places.out);
  out->mutable_region()->set_length_bytes(places.out_bytes);
  const size_t head_bytes = response->ByteSizeLong();
  const size_t rows_bytes = RowFieldsBytes(run);
  const uint64_t bytes = places.message + head_bytes + rows_bytes - begin;
  if (bytes > memory_.shape().reply_bytes) {
    return ReplyTooLarge(bytes, memory_.shape().reply_bytes);
  }
  std::memcpy(memory_.Range(places.lse, places.lse_bytes).data(), run.call.lse.data(),
              places.lse_bytes);
  if (run.call.out_place.empty()) {
    StoreOutput(run.output_dtype, run.call.out, memory_.Range(places.out, places.out_bytes).data());
  }
  // Not into the shared memory: what serializing does there is protobuf's business.
  slot.message.resize(head_bytes);
  response->SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(slot.message.data()));
  const absl::Span<std::byte> message = memory_.Range(places.message, head_bytes + rows_bytes);
  std::memcpy(message.data(), slot.message.data(), head_bytes);
  WriteRowFields(run, reinterpret_cast<uint8_t*>(message.data()) + head_bytes);
  SetReply(index, 0, places.message, message.size());
  return absl::OkStatus();
}

absl::Status Lane::WriteAppendAnswer(uint32_t index) {
  v1::AppendResponse response;
  response.set_message_count(1);
  response.set_duplicate_count(slots_[index].call->was_duplicate ? 1 : 0);
  WriteMessage(index, 0, memory_.ReplyOffset(index), response.SerializeAsString());
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
  SetReply(index, code, offset, message.size());
}

void Lane::SetReply(uint32_t index, uint32_t code, uint64_t offset, size_t bytes) {
  wire::SlotHead* const head = memory_.slot(index);
  wire::Store(&head->reply_code, code);
  wire::Store(&head->reply_offset, offset);
  wire::Store(&head->reply_bytes, static_cast<uint32_t>(bytes));
}

}  // namespace kvservice
