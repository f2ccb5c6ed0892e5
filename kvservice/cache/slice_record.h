// The stored form of one slice: one layer of one block of one sequence.
//
// A block's layers fill at different times (prefill goes layer by layer), so a record of a whole
// block would be written once per layer; records of slices are written once, and the open one again
// with every durable append to it.
//
//     header   magic u32, version u32, id [16], layer u32, block u32, token_count u32,
//              reserved u32, kv_bytes u64, sketch_bytes u64, previous [16]
//     payload  rows [kv_head][token_count][K | V][head_dim], then the sketch of a full slice
//     footer   checksum [16] of all that is before it
//
// `previous` is the checksum of the record before it in the same layer, or the seed of the sequence
// for block 0. A record's checksum thus names all earlier bytes of its layer and whose they are: a
// record that is damaged, of another sequence or place, or of another time does not fit.
//
// Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_CACHE_SLICE_RECORD_H_
#define KVSERVICE_KVSERVICE_CACHE_SLICE_RECORD_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvservice/cache/checksum.h"

namespace kvservice {

using StoredId = std::array<std::byte, 16>;

inline constexpr uint32_t kSliceRecordVersion = 1;

// What a record must say about itself.
struct SliceIdentity {
  StoredId id{};
  uint32_t layer = 0;
  uint32_t block = 0;
  uint32_t token_count = 0;  // 1 to kBlockTokens
  size_t kv_bytes = 0;
  size_t sketch_bytes = 0;  // 0 unless the slice is full
  Checksum previous{};
  friend bool operator==(const SliceIdentity&, const SliceIdentity&) = default;
};

// Views into the record.
struct SlicePayload {
  std::string_view kv;
  std::string_view sketch;
  // The record's own: `previous` of the next.
  Checksum checksum{};
};

// Bytes around the payload.
size_t SliceRecordOverheadBytes();

// What the checksum of a record with this payload is, without the record.
Checksum ChecksumOfSlice(const SliceIdentity& identity, std::string_view rows,
                         std::string_view sketch);

// A record with room for its payload, which Finish takes as it then is.
std::string BeginSliceRecord(const SliceIdentity& identity);
std::byte* SliceRecordPayload(std::string* record);
Checksum FinishSliceRecord(std::string* record);

// DATA_LOSS / RECORD_DAMAGED with what is wrong unless the record is whole and the expected one.
absl::StatusOr<SlicePayload> ParseSliceRecord(std::string_view record,
                                              const SliceIdentity& expected);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_SLICE_RECORD_H_
