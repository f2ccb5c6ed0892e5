#include "kvservice/cache/slice_record.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kvservice/cache/byte_codec.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr uint32_t kMagic = 0x4c53564b;  // "KVSL"
constexpr size_t kHeaderBytes = 4 + 4 + 16 + 4 + 4 + 4 + 4 + 8 + 8 + 16;
constexpr size_t kFooterBytes = sizeof(Checksum);

absl::Status Damaged(const SliceIdentity& expected, const char* problem) {
  return MakeError(absl::StatusCode::kDataLoss,
                   absl::StrCat("the stored slice of layer ", expected.layer, ", block ",
                                expected.block, " ", problem),
                   {.reason = "RECORD_DAMAGED",
                    .field = "",
                    .metadata = {{"layer", absl::StrCat(expected.layer)},
                                 {"block", absl::StrCat(expected.block)}}});
}

std::string HeaderOf(const SliceIdentity& identity) {
  ByteWriter writer;
  writer.Number(kMagic);
  writer.Number(kSliceRecordVersion);
  writer.Raw(identity.id.data(), identity.id.size());
  writer.Number(identity.layer);
  writer.Number(identity.block);
  writer.Number(identity.token_count);
  writer.Number(uint32_t{0});
  writer.Number(uint64_t{identity.kv_bytes});
  writer.Number(uint64_t{identity.sketch_bytes});
  writer.Raw(identity.previous.data(), identity.previous.size());
  return writer.Take();
}

}  // namespace

size_t SliceRecordOverheadBytes() { return kHeaderBytes + kFooterBytes; }

Checksum ChecksumOfSlice(const SliceIdentity& identity, std::string_view rows,
                         std::string_view sketch) {
  return ChecksumOf({HeaderOf(identity), rows, sketch});
}

std::string BeginSliceRecord(const SliceIdentity& identity) {
  std::string record;
  record.reserve(kHeaderBytes + identity.kv_bytes + identity.sketch_bytes + kFooterBytes);
  record.append(HeaderOf(identity));
  record.resize(kHeaderBytes + identity.kv_bytes + identity.sketch_bytes);
  return record;
}

std::byte* SliceRecordPayload(std::string* record) {
  return reinterpret_cast<std::byte*>(record->data()) + kHeaderBytes;
}

Checksum FinishSliceRecord(std::string* record) {
  const size_t bytes = record->size();
  Seal(record);
  Checksum checksum;
  std::memcpy(checksum.data(), record->data() + bytes, sizeof(checksum));
  return checksum;
}

absl::StatusOr<SlicePayload> ParseSliceRecord(std::string_view record,
                                              const SliceIdentity& expected) {
  const std::string_view bytes = Unseal(record);
  if (bytes.size() < kHeaderBytes) return Damaged(expected, "is damaged");
  ByteReader reader(bytes);
  const auto magic = reader.Number<uint32_t>();
  const auto version = reader.Number<uint32_t>();
  SliceIdentity found;
  reader.Raw(found.id.data(), found.id.size());
  found.layer = reader.Number<uint32_t>();
  found.block = reader.Number<uint32_t>();
  found.token_count = reader.Number<uint32_t>();
  const auto reserved = reader.Number<uint32_t>();
  found.kv_bytes = reader.Number<uint64_t>();
  found.sketch_bytes = reader.Number<uint64_t>();
  reader.Raw(found.previous.data(), found.previous.size());
  if (magic != kMagic || reserved != 0) return Damaged(expected, "is no record");
  if (version != kSliceRecordVersion) return Damaged(expected, "has another version");
  if (!(found == expected)) return Damaged(expected, "is of another place or time");
  if (expected.kv_bytes > reader.left() ||
      expected.sketch_bytes != reader.left() - expected.kv_bytes) {
    return Damaged(expected, "has another length than it says");
  }
  SlicePayload payload;
  payload.kv = reader.Bytes(expected.kv_bytes);
  payload.sketch = reader.Bytes(expected.sketch_bytes);
  std::memcpy(payload.checksum.data(), record.data() + bytes.size(), sizeof(payload.checksum));
  return payload;
}

}  // namespace kvservice
