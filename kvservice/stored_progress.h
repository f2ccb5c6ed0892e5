// How far a sequence is stored, and the slices that are still to be: between a sequence in memory
// and its rows in the disk tier. Executor thread, but for ReadSlices.

#ifndef KVSERVICE_KVSERVICE_STORED_PROGRESS_H_
#define KVSERVICE_KVSERVICE_STORED_PROGRESS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/cache/disk_tier.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/cache/slice_record.h"
#include "kvservice/engine.h"
#include "kvservice/stored_rows.h"

namespace kvservice {

struct LayerProgress {
  uint32_t length = 0;
  // Of the record of each full slice, while the sequence is in memory.
  std::vector<Checksum> full;
  // Of the last record, full or not; the seed if there is none.
  Checksum last{};
};

// Writes that were handed over count as stored: they are on disk in their order.
struct StoredProgress {
  Checksum seed{};
  // Of the S row that was handed over last.
  Checksum state{};
  std::vector<LayerProgress> layers;

  uint32_t length_min() const;
  uint32_t length_max() const;
};

// Bytes of rows for so many tokens of one layer.
uint64_t StoredLayerBytes(const CacheShape& shape, uint32_t length);
uint64_t StoredBytes(const CacheShape& shape, const StoredProgress& progress);

// Puts slices of one layer into `batch` until it is stored as far as the sequence has it, or the
// batch has `batch_bytes_max`. True if the layer is stored in full.
bool StoreLayer(const SequenceId& id, const CacheShape& shape, const Sequence& sequence,
                uint32_t layer, size_t batch_bytes_max, StoredProgress* progress, TierBatch* batch);
// Forgets stored tokens at and above `length`. The sequence still has those below.
void CutLayer(const SequenceId& id, const CacheShape& shape, const Sequence& sequence,
              uint32_t layer, uint32_t length, StoredProgress* progress, TierBatch* batch);

// What the record of a slice says about itself.
SliceIdentity SliceIdentityOf(const StoredId& id, const CacheShape& shape, uint32_t layer,
                              uint32_t block, uint32_t token_count, const Checksum& previous);
// The record of a slice of a sequence in memory. The same tokens make the same bytes.
std::string MakeSliceRecord(const Sequence& sequence, const SliceIdentity& identity,
                            Checksum* checksum);
// Tokens of a block of a layer that has `length`.
uint32_t TokensOfBlock(uint32_t block, uint32_t length);

// Consecutive slices of one layer to read.
struct SliceRange {
  uint32_t layer = 0;
  uint32_t first_block = 0;
  uint32_t end_block = 0;
  // Of the layer.
  uint32_t length = 0;
  // Of the record before the first.
  Checksum previous{};
};
struct ReadSlice {
  uint32_t layer = 0;
  uint32_t block = 0;
  uint32_t token_count = 0;
  std::string record;
  Checksum checksum{};
};
// Reads and checks. DATA_LOSS if one is missing, damaged or does not follow the one before it. Any
// thread.
absl::Status ReadSlices(const DiskTier& tier, const SequenceId& id, const CacheShape& shape,
                        const SliceRange& range, std::vector<ReadSlice>* slices);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORED_PROGRESS_H_
