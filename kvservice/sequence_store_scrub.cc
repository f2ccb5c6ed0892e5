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
  TierBatch batch;
  // Any sequence that stands on the row knows what it says.
  parts_.table->ForEach([&](const SequenceRecord* record) {
    if (!batch.empty()) return;
    const Model& model = *record->model;
    if (ModelKey(model.fingerprint) == key) {
      stored_models_.erase(model.fingerprint);
      PutModel(model, &batch);
    }
    for (const TableVersion* const version : {model.tables->first(), record->tables}) {
      if (batch.empty() && TableKey(model.fingerprint, version->digest) == key) {
        stored_tables_.erase({model.fingerprint, version->digest});
        PutTables(model, version, &batch);
      }
    }
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

absl::Status SequenceStore::MendSlices(SequenceRecord* record, uint32_t layer, uint32_t block) {
  const CacheShape& shape = record->tables->shape;
  LayerProgress& stored = record->stored->layers[layer];
  const uint64_t bytes_before = StoredLayerBytes(shape, stored.length);
  const uint64_t bytes_after = StoredLayerBytes(shape, block * kBlockTokens);
  // It takes no more room than before, so limits have no say.
  absl::Status status = CheckWritable();
  if (status.ok() && !worker_->HasRoom(bytes_before - bytes_after)) status = DiskBusy();
  if (!status.ok()) return status;
  SubtractBytes(*record, bytes_before - bytes_after);
  stored.full.resize(block);
  stored.length = block * kBlockTokens;
  stored.last = block == 0 ? record->stored->seed : stored.full.back();
  StoreLayerDurably(record, layer, [](const absl::Status&) {});
  return absl::OkStatus();
}

}  // namespace kvservice
