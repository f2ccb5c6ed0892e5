#include "kvservice/transfer_sender.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kvservice/cache/slice_record.h"
#include "kvservice/engine_errors.h"
#include "kvservice/stored_progress.h"

namespace kvservice {
namespace {

constexpr uint64_t kNsPerMs = 1'000'000;

TransferBegin ReadBegin(const SequenceRecord& record) {
  TransferHead head;
  head.id = record.id.bytes;
  head.generation = record.generation;
  head.model = record.model->spec.name;
  head.model_fingerprint = record.model->fingerprint;
  head.table_digest = record.tables->digest;
  for (uint32_t layer = 0; layer < record.model->spec.layer_count; ++layer) {
    head.lengths.push_back(record.cache->length(layer));
  }
  head.policy = record.policy;
  const uint64_t lease_ms = record.lease_ns / kNsPerMs;
  return {.head = WriteTransferHead(head),
          .lease_ms = static_cast<uint32_t>(
              std::min<uint64_t>(lease_ms, std::numeric_limits<uint32_t>::max()))};
}

TransferTables ReadTables(const SequenceRecord& record) {
  const std::vector<std::byte> bytes =
      EncodeSketchTables(record.model->spec.layout.head_dim, record.tables->tables);
  return {.encoded = {reinterpret_cast<const char*>(bytes.data()), bytes.size()}};
}

absl::StatusOr<TransferPart> ReadSlices(const SequenceRecord& record, const SendAsk& ask) {
  const uint32_t stored = record.cache->length(ask.layer);
  if (ask.length > stored) return LengthOutOfRange(ask.length, stored);
  const uint64_t end = uint64_t{ask.first_block} + ask.block_count;
  if (ask.block_count == 0 || end > BlockCount(ask.length)) {
    return LengthOutOfRange(ask.length, stored);
  }
  const CacheShape& shape = record.tables->shape;
  TransferSlices slices;
  slices.layer = ask.layer;
  slices.first_block = ask.first_block;
  const auto tokens = static_cast<size_t>(std::min(end * kBlockTokens, uint64_t{ask.length}) -
                                          uint64_t{ask.first_block} * kBlockTokens);
  slices.rows.resize(tokens * shape.layout.kv_head_count * shape.layout.row_bytes());
  std::string sketch(shape.sketch_bytes, '\0');
  size_t at = 0;
  Checksum previous = ask.previous;
  for (uint32_t block = ask.first_block; block < end; ++block) {
    const SliceIdentity identity = SliceIdentityOf(record.id.bytes, shape, ask.layer, block,
                                                   TokensOfBlock(block, ask.length), previous);
    record.cache->CopySlice(ask.layer, block, identity.token_count,
                            reinterpret_cast<std::byte*>(slices.rows.data() + at),
                            reinterpret_cast<std::byte*>(sketch.data()));
    previous =
        ChecksumOfSlice(identity, std::string_view(slices.rows).substr(at, identity.kv_bytes),
                        std::string_view(sketch).substr(0, identity.sketch_bytes));
    slices.checksums.push_back(previous);
    at += identity.kv_bytes;
  }
  return slices;
}

TransferSeeds ReadSeeds(const SequenceRecord& record, uint32_t layer) {
  TransferSeeds seeds;
  seeds.layer = layer;
  record.seeds.CopyTo(layer, &seeds.positions, &seeds.queries);
  seeds.checksum = ChecksumOfSeeds(seeds);
  return seeds;
}

}  // namespace

absl::StatusOr<TransferPart> ReadTransferPart(const SequenceRecord& record, const SendAsk& ask) {
  const uint32_t layer_count = record.model->spec.layer_count;
  if (ask.layer >= layer_count) return LayerOutOfRange(ask.layer, layer_count);
  switch (ask.part) {
    case SendAsk::Part::kBegin:
      return ReadBegin(record);
    case SendAsk::Part::kTables:
      return ReadTables(record);
    case SendAsk::Part::kSlices:
      return ReadSlices(record, ask);
    case SendAsk::Part::kSeeds:
      return ReadSeeds(record, ask.layer);
  }
  return LayerOutOfRange(ask.layer, layer_count);
}

}  // namespace kvservice
