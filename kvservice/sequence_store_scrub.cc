// What a look for damage needs of the store (store_scrub.h).

#include <algorithm>
#include <utility>

#include "kvservice/engine_errors.h"
#include "kvservice/sequence_store.h"

namespace kvservice {

void SequenceStore::Verify(StoreScrub::Done done) { scrub_->Verify(std::move(done)); }

void SequenceStore::SweepScrub() {
  if (enabled()) scrub_->Sweep();
}

void SequenceStore::StopScrub(const absl::Status& status) {
  if (enabled()) scrub_->Stop(status);
}

void SequenceStore::ReadForScrub(
    absl::AnyInvocable<DiskWorker::Answer(const DiskTier& tier)> read) {
  ++outstanding_;
  worker_->Read([this, read = std::move(read)](const DiskTier& tier) mutable -> DiskWorker::Answer {
    return [this, answer = read(tier)]() mutable {
      --outstanding_;
      answer();
    };
  });
}

std::vector<std::string> SequenceStore::RegistryKeys() const {
  std::vector<std::string> keys;
  for (const uint64_t fingerprint : stored_models_) keys.push_back(ModelKey(fingerprint));
  for (const auto& [fingerprint, digest] : stored_tables_) {
    keys.push_back(TableKey(fingerprint, digest));
  }
  return keys;
}

bool SequenceStore::MendRegistryRow(const std::string& key) {
  if (!CheckWritable().ok()) return false;
  // Forgotten, so that the next sequence that needs it writes it, should there be none now.
  std::erase_if(stored_models_, [&](uint64_t fingerprint) { return ModelKey(fingerprint) == key; });
  std::erase_if(stored_tables_, [&](const std::pair<uint64_t, Sha256::Digest>& tables) {
    return TableKey(tables.first, tables.second) == key;
  });
  TierBatch batch;
  parts_.table->ForEach([&](const SequenceRecord* record) {
    if (record->stored == nullptr) return;
    // What is there already is left out.
    PutModel(*record->model, &batch);
    PutTables(*record->model, record->model->tables->first(), &batch);
    PutTables(*record->model, record->tables, &batch);
  });
  if (batch.empty()) return false;
  Write(std::move(batch), true, [](const absl::Status&) {});
  return true;
}

absl::Status SequenceStore::MendRows(SequenceRecord* record) {
  absl::Status status = CheckWritable();
  if (!status.ok()) return status;
  std::string identity = IdentityRow(*record);
  // Slices name it.
  if (ChecksumOfRow(identity) != record->stored->seed) return SequenceLost();
  TierBatch batch;
  batch.puts.emplace_back(IdentityKey(record->id), std::move(identity));
  PutState(record, record->is_suspended, &batch);
  Write(std::move(batch), true, [](const absl::Status&) {});
  return absl::OkStatus();
}

absl::Status SequenceStore::MendSlice(SequenceRecord* record, uint32_t layer, uint32_t block) {
  absl::Status status = CheckWritable();
  if (!status.ok()) return status;
  const LayerProgress& stored = record->stored->layers[layer];
  const Checksum& previous = block == 0 ? record->stored->seed : stored.full[block - 1];
  Checksum checksum{};
  std::string row =
      MakeSliceRecord(*record->cache,
                      SliceIdentityOf(record->id.bytes, record->tables->shape, layer, block,
                                      TokensOfBlock(block, stored.length), previous),
                      &checksum);
  // The slices behind it name it.
  if (checksum != (block < stored.full.size() ? stored.full[block] : stored.last)) {
    return SequenceLost();
  }
  TierBatch batch;
  batch.puts.emplace_back(SliceKey(record->id, layer, block), std::move(row));
  Write(std::move(batch), true, [](const absl::Status&) {});
  return absl::OkStatus();
}

}  // namespace kvservice
