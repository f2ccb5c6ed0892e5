// A lane: the way of a client's Attend and Append calls through memory that it shares with a server
// on the same host. This header is the contract between the two; a version of it is fixed by
// kLaneVersion.
//
// The client connects to the Unix socket beside the server's (its path with kLaneSuffix after it),
// sends one message, an OpenLaneRequest (proto/kvservice/v1/lane.proto) of at most
// kLaneMessageBytesMax bytes together with the descriptor of a sealed memory file, and gets an
// OpenLaneResponse. The lane lives as long as that connection. Its memory:
//
//     LaneHead | SlotHead of slot 0 | SlotHead of slot 1 ...          rounded up to whole pages
//     request area of slot 0 | reply area of slot 0 | request area of slot 1 ...
//
// A slot carries one call at a time. The client writes tensors and a serialized request (its
// tensors are ranges of the memory) into the slot's request area, tells which method it is for and
// where the message lies, and makes request_number another number than it was. The server answers
// in the reply area and makes reply_number equal to request_number: the method's response, whose
// tensors are ranges of the reply area, or, with a code other than 0, a Status. Until then the slot
// belongs to the server.
//
// Another agent of the client's may store request_number, as a release that the whole system sees,
// once the rest is there, and read the outputs of an Attend where they will be (PlaceReply) once it
// sees, as an acquire, that reply_number is equal: a GPU's stream, for which the client has got
// everything else ready. It cannot wake a server that sleeps; the client looks for it. A client
// that gives such a call up makes reply_number equal itself, so that nothing waits for ever, and
// does not use the slot again.
//
// Attend (AttendRequest, AttendResponse) is as the unary call; calls of different slots are taken
// in any order. Append (AppendRequest, AppendResponse) is one message of an Append stream: applied
// on its own, and its response has the counts of this message and no sequence. Appends that wait
// in several slots are taken in the order of request_order, which the client counts up from call to
// call through the whole lane. One that fails stops none of those behind it, which are harmless
// where they are not refused: what is stored is never changed by them.
//
// Whoever sleeps has said so before looking for the last time, and the other one wakes it: the
// client by any byte on the socket, the server by a futex on reply_number. Both are hints, and
// nothing in the memory is believed: words are read once and checked as what was read.
//
// Words are accessed with Load and Store alone.

#ifndef KVSERVICE_WIRE_LANE_LAYOUT_H_
#define KVSERVICE_WIRE_LANE_LAYOUT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/types/span.h"

namespace kvservice::wire {

// Version 1 has no request_method and no request_order; what is there are zeros.
inline constexpr uint32_t kLaneVersion = 2;
inline constexpr uint32_t kLaneVersionMin = 1;
inline constexpr char kLaneSuffix[] = ".lane";
inline constexpr size_t kLaneMessageBytesMax = 4096;
inline constexpr uint32_t kLaneSlotsMax = 16;
// Sizes of areas are multiples of it.
inline constexpr uint64_t kLanePageBytes = 4096;
// Of tensors, from the start of the memory.
inline constexpr uint64_t kLaneAlignment = 64;

// As OpenLaneRequest tells it. Sizes are of each slot.
struct LaneShape {
  uint32_t slot_count = 0;
  uint64_t request_bytes = 0;
  uint64_t reply_bytes = 0;
};

// Values of request_method.
inline constexpr uint32_t kLaneAttend = 0;
inline constexpr uint32_t kLaneAppend = 1;

struct alignas(kLaneAlignment) LaneHead {
  // Written by the server: it must be woken.
  uint32_t server_asleep;
};

// Each side writes a cache line of its own, but for client_asleep.
struct SlotHead {
  alignas(kLaneAlignment) uint32_t request_number;
  uint32_t request_bytes;
  // From the start of the memory.
  uint64_t request_offset;
  uint32_t request_method;
  uint32_t request_order;

  alignas(kLaneAlignment) uint32_t reply_number;
  // Canonical gRPC code of the call.
  uint32_t reply_code;
  uint64_t reply_offset;
  uint32_t reply_bytes;
  // Written by the client: it must be woken.
  uint32_t client_asleep;
};

// Sequentially consistent: "say that I sleep, then look" needs it on both sides.
template <typename Word>
Word Load(const Word& word) {
  return std::atomic_ref<Word>(const_cast<Word&>(word)).load();
}
template <typename Word>
void Store(Word* word, Word value) {
  std::atomic_ref<Word>(*word).store(value);
}

inline uint64_t LaneHeadBytes(uint32_t slot_count) {
  const uint64_t bytes = sizeof(LaneHead) + slot_count * sizeof(SlotHead);
  return (bytes + kLanePageBytes - 1) / kLanePageBytes * kLanePageBytes;
}

// Bytes of a lane's memory; nothing for a shape that no lane can have.
inline std::optional<uint64_t> LaneBytes(const LaneShape& shape) {
  if (shape.slot_count == 0 || shape.slot_count > kLaneSlotsMax) return std::nullopt;
  for (const uint64_t bytes : {shape.request_bytes, shape.reply_bytes}) {
    if (bytes == 0 || bytes % kLanePageBytes != 0) return std::nullopt;
  }
  uint64_t bytes = 0;
  if (__builtin_add_overflow(shape.request_bytes, shape.reply_bytes, &bytes)) return std::nullopt;
  if (__builtin_mul_overflow(bytes, uint64_t{shape.slot_count}, &bytes)) return std::nullopt;
  if (__builtin_add_overflow(bytes, LaneHeadBytes(shape.slot_count), &bytes)) return std::nullopt;
  return bytes;
}

inline uint64_t AlignUp(uint64_t offset) {
  return (offset + kLaneAlignment - 1) / kLaneAlignment * kLaneAlignment;
}

// Where the parts of an Attend's answer lie, from the start of the memory.
struct ReplyPlaces {
  // [T][query_head_count] of float32.
  uint64_t lse = 0;
  uint64_t lse_bytes = 0;
  // [T][query_head_count][head_dim] of the output's type.
  uint64_t out = 0;
  uint64_t out_bytes = 0;
  uint64_t message = 0;
};

// In every version: lse first in the reply area, which begins at `begin`, out behind it and the
// message behind that, aligned. So clients know before the answer where outputs will be. A Status
// lies anywhere, also where outputs would.
inline ReplyPlaces PlaceReply(uint64_t begin, uint64_t lse_bytes, uint64_t out_bytes) {
  ReplyPlaces places = {.lse = begin, .lse_bytes = lse_bytes, .out_bytes = out_bytes};
  places.out = AlignUp(places.lse + lse_bytes);
  places.message = AlignUp(places.out + out_bytes);
  return places;
}

// True when [offset, offset + bytes) lies within `size` bytes, whatever the numbers are.
inline bool IsRange(uint64_t offset, uint64_t bytes, uint64_t size) {
  return offset <= size && bytes <= size - offset;
}

// The parts of a mapped lane. Borrows the memory, which has LaneBytes(shape) bytes.
class LaneMemory {
 public:
  LaneMemory(absl::Span<std::byte> memory, const LaneShape& shape)
      : memory_(memory), shape_(shape) {}

  const LaneShape& shape() const { return shape_; }
  absl::Span<std::byte> all() const { return memory_; }
  LaneHead* head() const { return reinterpret_cast<LaneHead*>(memory_.data()); }
  SlotHead* slot(uint32_t index) const {
    return reinterpret_cast<SlotHead*>(memory_.data() + sizeof(LaneHead)) + index;
  }
  // Offsets of a slot's areas.
  uint64_t RequestOffset(uint32_t index) const {
    return LaneHeadBytes(shape_.slot_count) + index * (shape_.request_bytes + shape_.reply_bytes);
  }
  uint64_t ReplyOffset(uint32_t index) const { return RequestOffset(index) + shape_.request_bytes; }
  absl::Span<std::byte> Range(uint64_t offset, uint64_t bytes) const {
    return memory_.subspan(offset, bytes);
  }

 private:
  absl::Span<std::byte> memory_;
  LaneShape shape_;
};

}  // namespace kvservice::wire

#endif  // KVSERVICE_WIRE_LANE_LAYOUT_H_
