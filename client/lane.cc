#include "client/lane.h"

#include <google/protobuf/arena.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string_view>
#include <thread>
#include <utility>

#include "client/error.h"
#include "client/replies.h"
#include "client/requests.h"
#include "client/status.h"
#include "kvservice/v1/error_details.pb.h"
#include "kvservice/v1/lane.pb.h"
#include "wire/default_spin.h"
#include "wire/lane_socket.h"

namespace kvservice::client {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr std::string_view kUnixPrefix = "unix:";
// A server that died without answering is noticed within this.
constexpr milliseconds kConnectionCheck{100};
// The server's reason for an answer that does not fit a slot.
constexpr char kReplyTooLarge[] = "REPLY_TOO_LARGE";
constexpr size_t kReplyArenaBytes = size_t{64} << 10;
// Between attempts to open a lane that broke.
constexpr milliseconds kReopenPause{1'000};
// Between looks whether a call was rung.
constexpr std::chrono::microseconds kRingNap{50};
// An offset that no message has.
constexpr uint64_t kNowhere = UINT64_MAX;

absl::Status Unavailable(const std::string& problem) {
  return MakeError(static_cast<int>(absl::StatusCode::kFailedPrecondition),
                   "no calls through shared memory: " + problem, kLaneUnavailable);
}

// Connected, with `deadline` for what blocks on it; empty when nobody listens.
FileDescriptor ConnectTo(const std::string& path, milliseconds deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) return {};
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  FileDescriptor connection(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval timeout{.tv_sec = deadline.count() / 1000,
                        .tv_usec = deadline.count() % 1000 * 1000};
  setsockopt(connection.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  setsockopt(connection.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  const auto* const to = reinterpret_cast<const sockaddr*>(&address);
  if (connect(connection.get(), to, sizeof(address)) != 0) return {};
  return connection;
}

absl::Status Unanswered(absl::StatusCode code, const std::string& problem) {
  return MakeError(static_cast<int>(code), problem + "; a prepared call takes no other way",
                   kLaneBroken);
}

// Whether the call may be answered by another way.
bool IsForOthers(const absl::Status& status) {
  return absl::IsUnavailable(status) || ReasonOf(status) == kReplyTooLarge;
}

absl::Status CheckInPlace(const TensorView& tensor, absl::Span<const std::byte> place,
                          const std::string& field) {
  if (tensor.bytes.data() == place.data() && tensor.bytes.size() == place.size()) {
    return absl::OkStatus();
  }
  return InvalidRequest(field, "is not the buffers', whole, as a prepared call's has to be");
}

wire::LaneShape ShapeOf(const LaneOptions& options) {
  const uint64_t pages =
      (std::max<uint64_t>(options.call_bytes_max, 1) + wire::kLanePageBytes - 1) /
      wire::kLanePageBytes;
  const uint64_t bytes = pages * wire::kLanePageBytes;
  return {.slot_count = std::clamp<uint32_t>(options.calls_max, 1, wire::kLaneSlotsMax),
          .request_bytes = bytes,
          .reply_bytes = bytes};
}

// Whether they can be read where they lie for as long as `memory` is there.
bool AreFloatsIn(absl::Span<const std::byte> memory, absl::Span<const std::byte> bytes) {
  const std::less_equal<const std::byte*> is_up_to;
  return is_up_to(memory.data(), bytes.data()) &&
         is_up_to(bytes.data() + bytes.size(), memory.data() + memory.size()) &&
         reinterpret_cast<uintptr_t>(bytes.data()) % alignof(float) == 0;
}

absl::Status Introduce(int socket, const wire::LaneShape& shape, int memory) {
  v1::OpenLaneRequest request;
  request.set_version(wire::kLaneVersion);
  request.set_slot_count(shape.slot_count);
  request.set_request_bytes(shape.request_bytes);
  request.set_reply_bytes(shape.reply_bytes);
  if (!wire::SendMessage(socket, request.SerializeAsString(), memory)) {
    return Unavailable("the server closed the connection");
  }
  const wire::Received received = wire::ReceiveMessage(socket);
  if (received.count <= 0) return Unavailable("the server did not answer");
  v1::OpenLaneResponse response;
  if (!response.ParseFromString(received.bytes) || response.version() == 0) {
    return Unavailable("the server's answer makes no sense");
  }
  if (!response.has_error()) return absl::OkStatus();
  const v1::Status& error = response.error();
  if (error.code() == 0) return Unavailable("the server gives no reason");
  return StatusFromWire(error.code(), error.message(), error.SerializeAsString());
}

}  // namespace

absl::StatusOr<std::shared_ptr<Lane>> Lane::Open(const ClientOptions& options) {
  const std::string_view endpoint = options.endpoint;
  if (endpoint.substr(0, kUnixPrefix.size()) != kUnixPrefix) {
    return Unavailable(options.endpoint + " is no Unix socket");
  }
  const std::string path = std::string(endpoint.substr(kUnixPrefix.size())) + wire::kLaneSuffix;
  FileDescriptor socket = ConnectTo(path, options.deadlines.connect);
  if (socket.get() < 0) return Unavailable("nobody listens at " + path);
  const wire::LaneShape shape = ShapeOf(options.lane);
  const std::optional<uint64_t> bytes = wire::LaneBytes(shape);
  if (!bytes.has_value()) return Unavailable("call_bytes_max is too large");
  const FileDescriptor file = wire::NewSealedMemory(*bytes);
  wire::SharedMemory memory = wire::SharedMemory::Map(file.get(), *bytes);
  if (memory.bytes().empty()) return Unavailable("the system gives no memory");
  const absl::Status opened = Introduce(socket.get(), shape, file.get());
  if (!opened.ok()) return opened;
  const std::chrono::microseconds spin =
      options.lane.spin.value_or(std::chrono::microseconds(wire::DefaultSpinUs()));
  return std::shared_ptr<Lane>(new Lane(std::move(socket), std::move(memory), shape, spin));
}

std::optional<uint32_t> Lane::BeginAttend(const AttendStep& step, v1::AttendRequest* request) {
  const std::optional<uint32_t> index = TakeSlot(step.buffers);
  if (!index.has_value()) return std::nullopt;
  if (!PutRequest(*index, step, request)) {
    LeaveSlot(*index, false);
    return std::nullopt;
  }
  if (Ring(*index)) return index;
  Break();
  LeaveSlot(*index, true);
  return std::nullopt;
}

std::optional<absl::StatusOr<AttendResult>> Lane::EndAttend(uint32_t index,
                                                            const v1::AttendRequest& request,
                                                            StepBuffers* buffers,
                                                            steady_clock::time_point deadline) {
  AttendResult prepared;
  // In time that is the server's.
  if (!IsAnswered(index)) prepared = PrepareResult(request, buffers == nullptr);
  switch (Wait(index, deadline)) {
    case Outcome::kAnswered:
      break;
    case Outcome::kTimeOver:
      LeaveSlot(index, true);
      return absl::DeadlineExceededError("the server did not answer in time");
    case Outcome::kBroken:
      Break();
      LeaveSlot(index, true);
      return std::nullopt;
  }
  absl::StatusOr<AttendResult> result =
      TakeReply(index, request, std::move(prepared), buffers, nullptr);
  LeaveSlot(index, false);
  if (!result.ok() && IsForOthers(result.status())) return std::nullopt;
  return result;
}

absl::StatusOr<PreparedSlot> Lane::PrepareAttend(const AttendStep& step,
                                                 v1::AttendRequest* request) {
  const StepBuffers& buffers = *step.buffers;
  if (buffers.lane_.get() != this) return Unavailable("the buffers are not in the open lane");
  absl::Status status = CheckInPlace(step.q, buffers.q(), "q");
  if (status.ok() && !step.k.empty()) status = CheckInPlace(step.k, buffers.k(), "k");
  if (status.ok() && !step.v.empty()) status = CheckInPlace(step.v, buffers.v(), "v");
  if (!status.ok()) return status;
  if (!TakeSlot(&buffers).has_value()) return Unavailable("the buffers' slot has a call");
  const uint32_t index = buffers.slot_;
  if (!PutRequest(index, step, request)) {
    LeaveSlot(index, false);
    return Unavailable("the call is too large for a slot of " +
                       std::to_string(memory_.shape().request_bytes) + " bytes");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  // From here on a lane that breaks lets go of it.
  if (is_broken_) return Unavailable("the lane has just broken");
  slots_[index].is_prepared = true;
  const auto floats = [this](uint64_t offset, uint64_t bytes) {
    return absl::MakeConstSpan(reinterpret_cast<const float*>(memory_.Range(offset, bytes).data()),
                               bytes / sizeof(float));
  };
  const wire::ReplyPlaces places = PlacesOf(index, *request);
  wire::SlotHead* const head = memory_.slot(index);
  return PreparedSlot{.index = index,
                      .doorbell = {.request = &head->request_number,
                                   .value = slots_[index].number,
                                   .reply = &head->reply_number},
                      .lse = floats(places.lse, places.lse_bytes),
                      .out = floats(places.out, places.out_bytes)};
}

void Lane::RingPrepared(uint32_t index) {
  if (!Ring(index)) Break();
}

absl::StatusOr<AttendResult> Lane::EndPrepared(uint32_t index, const v1::AttendRequest& request,
                                               StepBuffers* buffers,
                                               steady_clock::time_point deadline) {
  AttendResult prepared;
  if (!IsAnswered(index)) prepared = PrepareResult(request, false);
  Outcome outcome = WaitForRing(index, deadline);
  if (outcome == Outcome::kAnswered) outcome = Wait(index, deadline);
  if (outcome != Outcome::kAnswered) Break();
  if (outcome == Outcome::kAnswered && !IsReleased(index)) {
    const wire::ReplyPlaces places = PlacesOf(index, request);
    absl::StatusOr<AttendResult> result =
        TakeReply(index, request, std::move(prepared), buffers, &places);
    LeaveSlot(index, false);
    return result;
  }
  LeaveSlot(index, true);
  switch (outcome) {
    case Outcome::kAnswered:
      break;
    case Outcome::kTimeOver:
      return Unanswered(absl::StatusCode::kDeadlineExceeded, "the server did not answer in time");
    case Outcome::kBroken:
      return Unanswered(absl::StatusCode::kUnavailable, "the server is gone");
  }
  return Unanswered(absl::StatusCode::kUnavailable, "the lane broke before the answer");
}

void Lane::DropPrepared(uint32_t index) {
  wire::SlotHead* const head = memory_.slot(index);
  if (wire::Load(head->request_number) != slots_[index].number) {
    // Should it be rung all the same, it is refused. Its number is not used again.
    wire::Store(&head->request_offset, kNowhere);
    LeaveSlot(index, false);
    return;
  }
  const bool is_answered = IsAnswered(index);
  if (!is_answered && !WakeServer()) Break();
  LeaveSlot(index, !is_answered);
}

void Lane::Break() {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_broken_ = true;
  std::vector<uint32_t> waiting;
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].is_prepared && !slots_[i].is_released && !IsAnswered(i)) waiting.push_back(i);
  }
  // First: a stream that is let go of runs on with outputs that nobody has computed, and what it
  // rings then must not be stored.
  for (const uint32_t i : waiting) wire::Store(&memory_.slot(i)->request_offset, kNowhere);
  for (const uint32_t i : waiting) {
    wire::SlotHead* const head = memory_.slot(i);
    slots_[i].is_released = true;
    wire::Store(&head->reply_code, static_cast<uint32_t>(absl::StatusCode::kUnavailable));
    wire::Store(&head->reply_number, slots_[i].number);
    wire::Wake(&head->reply_number);
  }
}

bool Lane::IsReleased(uint32_t index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return slots_[index].is_released;
}

void Lane::Reclaim(uint32_t index) {
  Slot& slot = slots_[index];
  if (!slot.is_abandoned || wire::Load(memory_.slot(index)->reply_number) != slot.number) return;
  slot.is_abandoned = false;
  slot.is_prepared = false;
  slot.is_taken = slot.is_reserved;
}

std::optional<uint32_t> Lane::TakeSlot(const StepBuffers* buffers) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // Then answers may be this client's own.
  if (is_broken_) return std::nullopt;
  if (buffers != nullptr && buffers->lane_.get() == this) {
    Reclaim(buffers->slot_);
    const Slot& slot = slots_[buffers->slot_];
    if (slot.is_abandoned || slot.is_prepared) return std::nullopt;
    return buffers->slot_;
  }
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    Reclaim(i);
    if (slots_[i].is_taken) continue;
    slots_[i].is_taken = true;
    return i;
  }
  return std::nullopt;
}

void Lane::LeaveSlot(uint32_t index, bool abandon) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot& slot = slots_[index];
  slot.is_taken = abandon || slot.is_reserved;
  slot.is_abandoned = abandon;
  slot.is_prepared = abandon && slot.is_prepared;
}

std::optional<uint32_t> Lane::ReserveSlot(size_t tensor_bytes) {
  if (tensor_bytes >= memory_.shape().request_bytes) return std::nullopt;
  const std::optional<uint32_t> index = TakeSlot(nullptr);
  if (!index.has_value()) return std::nullopt;
  const std::lock_guard<std::mutex> lock(mutex_);
  slots_[*index].is_reserved = true;
  return index;
}

void Lane::ReturnSlot(uint32_t index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  slots_[index].is_reserved = false;
  slots_[index].is_taken = slots_[index].is_abandoned || slots_[index].is_prepared;
}

bool Lane::PutRequest(uint32_t index, const AttendStep& step, v1::AttendRequest* request) {
  const uint64_t begin = memory_.RequestOffset(index);
  const uint64_t end = begin + memory_.shape().request_bytes;
  uint64_t offset = begin;
  const auto put = [&](const TensorView& tensor, v1::Tensor* to) {
    if (tensor.empty()) return true;
    const uint64_t bytes = tensor.bytes.size();
    if (!wire::IsRange(offset, bytes, end)) return false;
    std::byte* const place = memory_.Range(offset, bytes).data();
    // StepBuffers have their tensors in place already.
    if (place != tensor.bytes.data()) std::memmove(place, tensor.bytes.data(), bytes);
    to->mutable_region()->set_offset_bytes(offset);
    to->mutable_region()->set_length_bytes(bytes);
    offset = wire::AlignUp(offset + bytes);
    return true;
  };
  // Absent tensors must not come into being by being named.
  if (!put(step.q, request->mutable_q())) return false;
  if (!step.k.empty() && !put(step.k, request->mutable_k())) return false;
  if (!step.v.empty() && !put(step.v, request->mutable_v())) return false;
  if (const StepBuffers* const buffers = step.buffers;
      buffers != nullptr && buffers->lane_.get() == this) {
    // Tensors that this step leaves out are the caller's all the same.
    offset = std::max(offset, begin + buffers->tensor_bytes());
  }
  const uint64_t bytes = request->ByteSizeLong();
  const uint64_t output_bytes = PlacesOf(index, *request).message - memory_.ReplyOffset(index);
  if (!wire::IsRange(offset, bytes, end) || output_bytes > memory_.shape().reply_bytes) {
    return false;
  }
  request->SerializeWithCachedSizesToArray(
      reinterpret_cast<uint8_t*>(memory_.Range(offset, bytes).data()));
  PutHead(index, wire::kLaneAttend, offset, bytes);
  return true;
}

wire::ReplyPlaces Lane::PlacesOf(uint32_t index, const v1::AttendRequest& request) const {
  const auto& shape = request.q().shape();
  const uint64_t heads = static_cast<uint64_t>(shape[0]) * static_cast<uint64_t>(shape[1]);
  const uint64_t lse_bytes = heads * sizeof(float);
  return wire::PlaceReply(memory_.ReplyOffset(index), lse_bytes,
                          lse_bytes * static_cast<uint64_t>(shape[2]));
}

void Lane::PutHead(uint32_t index, uint32_t method, uint64_t offset, uint64_t bytes) {
  ++slots_[index].number;
  wire::SlotHead* const head = memory_.slot(index);
  wire::Store(&head->client_asleep, uint32_t{0});
  wire::Store(&head->request_method, method);
  wire::Store(&head->request_offset, offset);
  wire::Store(&head->request_bytes, static_cast<uint32_t>(bytes));
}

bool Lane::Ring(uint32_t index) {
  wire::Store(&memory_.slot(index)->request_number, slots_[index].number);
  return WakeServer();
}

bool Lane::WakeServer() const {
  if (wire::Load(memory_.head()->server_asleep) == 0) return true;
  const char byte = 0;
  // A full socket holds bytes that the server has not read yet, and will.
  return send(socket_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL) == 1 || errno == EAGAIN;
}

bool Lane::BeginAppend(uint32_t index, const AppendPart& part) {
  v1::AppendRequest request = part.request;
  uint64_t offset = memory_.RequestOffset(index);
  const auto put = [&](const TensorView& tensor, v1::Tensor* to) {
    const uint64_t bytes = tensor.bytes.size();
    std::memcpy(memory_.Range(offset, bytes).data(), tensor.bytes.data(), bytes);
    DescribeTensor(tensor, tensor.token_count, to);
    to->mutable_region()->set_offset_bytes(offset);
    to->mutable_region()->set_length_bytes(bytes);
    offset = wire::AlignUp(offset + bytes);
  };
  put(part.k, request.mutable_k());
  put(part.v, request.mutable_v());
  if (!part.query_sample.empty()) put(part.query_sample, request.mutable_query_sample());
  const uint64_t bytes = request.ByteSizeLong();
  request.SerializeWithCachedSizesToArray(
      reinterpret_cast<uint8_t*>(memory_.Range(offset, bytes).data()));
  PutHead(index, wire::kLaneAppend, offset, bytes);
  bool is_rung = false;
  {
    // Together: whoever has the lower number is seen first.
    const std::lock_guard<std::mutex> lock(mutex_);
    wire::Store(&memory_.slot(index)->request_order, ++append_order_);
    is_rung = Ring(index);
  }
  if (!is_rung) Break();
  return is_rung;
}

absl::StatusOr<v1::AppendResponse> Lane::EndAppend(uint32_t index,
                                                   steady_clock::time_point deadline) {
  switch (Wait(index, deadline)) {
    case Outcome::kAnswered:
      break;
    case Outcome::kTimeOver:
      return absl::DeadlineExceededError("the server did not answer in time");
    case Outcome::kBroken:
      Break();
      return absl::UnavailableError("the server is gone");
  }
  std::string message;
  absl::Status status = TakeMessage(index, &message);
  if (!status.ok()) return status;
  v1::AppendResponse response;
  if (!response.ParseFromString(message)) return MalformedReply("message", "does not parse");
  return response;
}

std::vector<uint32_t> Lane::ReserveAppendSlots(uint32_t count) {
  std::vector<uint32_t> indices;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t i = 0; i < slots_.size() && !is_broken_; ++i) {
    if (indices.size() == count || append_slots_ + 1 > slots_.size() / 2) break;
    Reclaim(i);
    if (slots_[i].is_taken) continue;
    slots_[i].is_taken = true;
    slots_[i].is_reserved = true;
    ++append_slots_;
    indices.push_back(i);
  }
  return indices;
}

void Lane::ReturnAppendSlot(uint32_t index) {
  ReturnSlot(index);
  const std::lock_guard<std::mutex> lock(mutex_);
  --append_slots_;
}

bool Lane::IsAnswered(uint32_t index) const {
  return wire::Load(memory_.slot(index)->reply_number) == slots_[index].number;
}

bool Lane::SpinForReply(uint32_t index) const {
  const steady_clock::time_point end = steady_clock::now() + spin_;
  do {
    if (IsAnswered(index)) return true;
    std::this_thread::yield();
  } while (steady_clock::now() < end);
  return false;
}

// Words are looked at in the order that the server's last look before it sleeps relies on: once the
// number is seen, a server that has not said that it sleeps will see it too.
Lane::Outcome Lane::WaitForRing(uint32_t index, steady_clock::time_point deadline) const {
  const wire::SlotHead& head = *memory_.slot(index);
  const uint32_t number = slots_[index].number;
  steady_clock::time_point now = steady_clock::now();
  const steady_clock::time_point spin_end = now + spin_;
  steady_clock::time_point check_at = now + kConnectionCheck;
  while (wire::Load(head.request_number) != number) {
    // By a lane that broke.
    if (IsAnswered(index)) return Outcome::kAnswered;
    if (now >= deadline) return Outcome::kTimeOver;
    if (now >= check_at) {
      if (!IsConnected()) return Outcome::kBroken;
      check_at = now + kConnectionCheck;
    }
    if (now < spin_end) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kRingNap);
    }
    now = steady_clock::now();
  }
  return WakeServer() ? Outcome::kAnswered : Outcome::kBroken;
}

Lane::Outcome Lane::Wait(uint32_t index, steady_clock::time_point deadline) {
  if (spin_.count() > 0 && SpinForReply(index)) return Outcome::kAnswered;
  wire::SlotHead* const head = memory_.slot(index);
  const uint32_t number = slots_[index].number;
  wire::Store(&head->client_asleep, uint32_t{1});
  steady_clock::time_point check_at = steady_clock::now() + kConnectionCheck;
  for (;;) {
    const uint32_t seen = wire::Load(head->reply_number);
    if (seen == number) return Outcome::kAnswered;
    const steady_clock::time_point now = steady_clock::now();
    if (now >= deadline) return Outcome::kTimeOver;
    if (now >= check_at) {
      if (!IsConnected()) return Outcome::kBroken;
      check_at = now + kConnectionCheck;
    }
    wire::SleepWhile(&head->reply_number, seen, std::min(deadline, check_at) - now);
  }
}

bool Lane::IsConnected() const {
  std::array<char, 1> byte;
  const ssize_t got = recv(socket_.get(), byte.data(), byte.size(), MSG_PEEK | MSG_DONTWAIT);
  return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}

absl::Status Lane::TakeMessage(uint32_t index, std::string* message) {
  const wire::SlotHead& head = *memory_.slot(index);
  const uint64_t offset = wire::Load(head.reply_offset);
  const uint32_t bytes = wire::Load(head.reply_bytes);
  const uint32_t code = wire::Load(head.reply_code);
  const uint64_t begin = memory_.ReplyOffset(index);
  if (offset < begin || !wire::IsRange(offset, bytes, begin + memory_.shape().reply_bytes)) {
    Break();
    return MalformedReply("reply_offset", "is not in the slot");
  }
  const absl::Span<const std::byte> range = memory_.Range(offset, bytes);
  message->assign(reinterpret_cast<const char*>(range.data()), range.size());
  if (code == 0) return absl::OkStatus();
  v1::Status error;
  error.ParseFromString(*message);
  return StatusFromWire(static_cast<int>(code), error.message(), *message);
}

absl::StatusOr<AttendResult> Lane::TakeReply(uint32_t index, const v1::AttendRequest& request,
                                             AttendResult prepared, StepBuffers* buffers,
                                             const wire::ReplyPlaces* places) {
  std::string& message = slots_[index].message;
  const absl::Status status = TakeMessage(index, &message);
  if (!status.ok()) return status;
  // That of a few rows needs no other memory.
  alignas(std::max_align_t) std::array<char, kReplyArenaBytes> block;
  google::protobuf::ArenaOptions arena_options;
  arena_options.initial_block = block.data();
  arena_options.initial_block_size = block.size();
  google::protobuf::Arena arena(arena_options);
  const uint64_t begin = memory_.ReplyOffset(index);
  const ReplyRegion region = {.offset = begin,
                              .bytes = memory_.Range(begin, memory_.shape().reply_bytes),
                              .places = places};
  absl::Span<const std::byte> out;
  absl::StatusOr<AttendResult> result = ResultFromMessage(
      request, message, region, &arena, std::move(prepared), buffers != nullptr ? &out : nullptr);
  if (!result.ok()) return result;
  result->transport = Transport::kLane;
  if (buffers != nullptr) {
    // A slot that is not theirs will be somebody else's soon, and the message is gone even sooner.
    const bool stays = buffers->lane_.get() == this && AreFloatsIn(region.bytes, out);
    buffers->KeepOutputs(out, stays);
  }
  return result;
}

absl::Status LanePath::Open() {
  const std::lock_guard<std::mutex> lock(mutex_);
  absl::StatusOr<std::shared_ptr<Lane>> lane = Lane::Open(*options_);
  if (!lane.ok()) return lane.status();
  lane_ = *std::move(lane);
  was_open_ = true;
  return absl::OkStatus();
}

std::shared_ptr<Lane> LanePath::Get() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (lane_ != nullptr && !lane_->is_broken()) return lane_;
    const steady_clock::time_point now = steady_clock::now();
    if (lane_ != nullptr) retry_at_ = now + kReopenPause;
    lane_ = nullptr;
    // Whoever opens a lane lets the others go another way meanwhile.
    if (!was_open_ || is_opening_ || now < retry_at_) return nullptr;
    is_opening_ = true;
  }
  absl::StatusOr<std::shared_ptr<Lane>> lane = Lane::Open(*options_);
  const std::lock_guard<std::mutex> lock(mutex_);
  is_opening_ = false;
  retry_at_ = steady_clock::now() + kReopenPause;
  if (lane.ok()) lane_ = *std::move(lane);
  return lane_;
}

}  // namespace kvservice::client
