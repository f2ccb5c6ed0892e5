// Everything that has a stored form, read from bytes that may be anything: nothing, or something
// that is written again as the bytes that it was read from.
//
// Input: which form, then its bytes. Their checksum is made right, so that what is behind it is
// looked at.

#include <cstdlib>
#include <cstring>
#include <string>

#include "attention/sketch_table.h"
#include "kvservice/cache/byte_codec.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/cache/slice_record.h"
#include "kvservice/stored_rows.h"
#include "kvservice/transfer.h"
#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

void Expect(bool condition) {
  if (!condition) std::abort();
}

template <typename Read, typename Write>
void RoundTrip(const std::string& bytes, Read read, Write write) {
  const auto value = read(bytes);
  if (value.has_value()) Expect(write(*value) == bytes);
}

void RunSlice(FuzzInput input) {
  SliceIdentity identity;
  identity.layer = input.Take<uint8_t>();
  identity.block = input.Take<uint8_t>();
  identity.token_count = input.Take<uint8_t>();
  identity.kv_bytes = input.Take<uint16_t>();
  identity.sketch_bytes = input.Take<uint16_t>();
  std::string record = input.Rest();
  Expect(!ParseSliceRecord(record, identity).ok() || record.size() > SliceRecordOverheadBytes());
  Seal(&record);
  const absl::StatusOr<SlicePayload> payload = ParseSliceRecord(record, identity);
  if (!payload.ok()) {
    Expect(absl::IsDataLoss(payload.status()));
    return;
  }
  Expect(payload->kv.size() == identity.kv_bytes);
  Expect(payload->sketch.size() == identity.sketch_bytes);
  Expect(payload->checksum == ChecksumOfSlice(identity, payload->kv, payload->sketch));
}

void RunTables(const std::string& bytes) {
  for (const uint32_t head_dim : {64U, 80U, 128U}) {
    const auto span =
        absl::MakeConstSpan(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size());
    const auto tables = DecodeSketchTables(head_dim, span);
    if (!tables.ok()) continue;
    const std::vector<std::byte> again = EncodeSketchTables(head_dim, *tables);
    Expect(again.size() == span.size() && std::equal(again.begin(), again.end(), span.begin()));
  }
}

void Run(const uint8_t* data, size_t size) {
  FuzzInput input(data, size);
  const auto kind = input.Take<uint8_t>();
  if (kind % 9 == 0) return RunSlice(input);
  std::string bytes = input.Rest();
  if (kind % 9 == 1) return RunTables(bytes);
  if (kind % 9 == 2) return RoundTrip(bytes, ReadInventory, WriteInventory);
  Seal(&bytes);
  switch (kind % 9) {
    case 3:
      return RoundTrip(bytes, ReadModel, WriteModel);
    case 4:
      return RoundTrip(bytes, ReadTables, WriteTables);
    case 5:
      return RoundTrip(bytes, ReadIdentity, WriteIdentity);
    case 6:
      return RoundTrip(bytes, ReadState, WriteState);
    case 7:
      return RoundTrip(
          bytes, [](const std::string& row) { return ReadLost(SequenceId(), row); },
          [](const std::string& tenant) { return WriteLost(SequenceId(), tenant); });
    default:
      return RoundTrip(bytes, ReadTransferHead, WriteTransferHead);
  }
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run(data, size);
  return 0;
}
