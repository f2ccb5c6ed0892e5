#include "kvservice/stored_progress.h"

#include <algorithm>
#include <utility>

#include "kvservice/cache/slice_record.h"

namespace kvservice {
namespace {

// Stores the first `token_count` tokens of a block; all blocks before it are stored in full.
void StoreSlice(const SequenceId& id, const CacheShape& shape, const Sequence& sequence,
                uint32_t layer, uint32_t block, uint32_t token_count, StoredProgress* progress,
                TierBatch* batch) {
  LayerProgress& stored = progress->layers[layer];
  const Checksum& previous = block == 0 ? progress->seed : stored.full[block - 1];
  std::string record = MakeSliceRecord(
      sequence, SliceIdentityOf(id.bytes, shape, layer, block, token_count, previous),
      &stored.last);
  stored.length = block * kBlockTokens + token_count;
  if (token_count == kBlockTokens) stored.full.push_back(stored.last);
  batch->puts.emplace_back(SliceKey(id, layer, block), std::move(record));
}

}  // namespace

std::string MakeSliceRecord(const Sequence& sequence, const SliceIdentity& identity,
                            Checksum* checksum) {
  std::string record = BeginSliceRecord(identity);
  std::byte* const payload = SliceRecordPayload(&record);
  sequence.CopySlice(identity.layer, identity.block, identity.token_count, payload,
                     payload + identity.kv_bytes);
  *checksum = FinishSliceRecord(&record);
  return record;
}

SliceIdentity SliceIdentityOf(const StoredId& id, const CacheShape& shape, uint32_t layer,
                              uint32_t block, uint32_t token_count, const Checksum& previous) {
  return {.id = id,
          .layer = layer,
          .block = block,
          .token_count = token_count,
          .kv_bytes = size_t{token_count} * shape.layout.kv_head_count * shape.layout.row_bytes(),
          .sketch_bytes = token_count == kBlockTokens ? shape.sketch_bytes : 0,
          .previous = previous};
}

uint32_t TokensOfBlock(uint32_t block, uint32_t length) {
  return std::min(kBlockTokens, length - block * kBlockTokens);
}

uint32_t StoredProgress::length_min() const {
  uint32_t length = UINT32_MAX;
  for (const LayerProgress& layer : layers) length = std::min(length, layer.length);
  return length;
}

uint32_t StoredProgress::length_max() const {
  uint32_t length = 0;
  for (const LayerProgress& layer : layers) length = std::max(length, layer.length);
  return length;
}

uint64_t StoredLayerBytes(const CacheShape& shape, uint32_t length) {
  const uint64_t rows = uint64_t{length} * shape.layout.kv_head_count * shape.layout.row_bytes();
  return rows + uint64_t{length / kBlockTokens} * shape.sketch_bytes +
         uint64_t{BlockCount(length)} * SliceRecordOverheadBytes();
}

uint64_t StoredBytes(const CacheShape& shape, const StoredProgress& progress) {
  uint64_t bytes = 0;
  for (const LayerProgress& layer : progress.layers) bytes += StoredLayerBytes(shape, layer.length);
  return bytes;
}

bool StoreLayer(const SequenceId& id, const CacheShape& shape, const Sequence& sequence,
                uint32_t layer, size_t batch_bytes_max, StoredProgress* progress,
                TierBatch* batch) {
  const uint32_t length = sequence.length(layer);
  size_t bytes = batch->bytes();
  while (progress->layers[layer].length < length) {
    if (bytes >= batch_bytes_max) return false;
    const uint32_t block = progress->layers[layer].length / kBlockTokens;
    StoreSlice(id, shape, sequence, layer, block, TokensOfBlock(block, length), progress, batch);
    bytes += batch->puts.back().second.size();
  }
  return true;
}

void CutLayer(const SequenceId& id, const CacheShape& shape, const Sequence& sequence,
              uint32_t layer, uint32_t length, StoredProgress* progress, TierBatch* batch) {
  LayerProgress& stored = progress->layers[layer];
  if (stored.length <= length) return;
  const uint32_t full_count = length / kBlockTokens;
  stored.full.resize(full_count);
  stored.length = full_count * kBlockTokens;
  stored.last = full_count == 0 ? progress->seed : stored.full.back();
  batch->removed_ranges.emplace_back(SliceKey(id, layer, full_count), SliceKeyEnd(id, layer));
  if (length % kBlockTokens == 0) return;
  StoreSlice(id, shape, sequence, layer, full_count, length % kBlockTokens, progress, batch);
}

absl::Status ReadSlices(const DiskTier& tier, const SequenceId& id, const CacheShape& shape,
                        const SliceRange& range, std::vector<ReadSlice>* slices) {
  Checksum previous = range.previous;
  for (uint32_t block = range.first_block; block < range.end_block; ++block) {
    ReadSlice slice;
    slice.layer = range.layer;
    slice.block = block;
    slice.token_count = TokensOfBlock(block, range.length);
    absl::StatusOr<std::string> record = tier.Read(SliceKey(id, range.layer, block));
    if (!record.ok()) return record.status();
    slice.record = *std::move(record);
    const absl::StatusOr<SlicePayload> payload = ParseSliceRecord(
        slice.record,
        SliceIdentityOf(id.bytes, shape, range.layer, block, slice.token_count, previous));
    if (!payload.ok()) return payload.status();
    previous = slice.checksum = payload->checksum;
    slices->push_back(std::move(slice));
  }
  return absl::OkStatus();
}

}  // namespace kvservice
