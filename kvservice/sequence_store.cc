#include "kvservice/sequence_store.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kvservice/cache/slice_record.h"
#include "kvservice/engine_errors.h"
#include "kvservice/store_recovery.h"
#include "kvservice/store_rows.h"

namespace kvservice {
namespace {

// What is copied between memory and disk at a time: about a millisecond of the executor.
constexpr size_t kPieceBytes = size_t{8} << 20;
// What files may hold beside twice what rows may.
constexpr uint64_t kFileBytesSlack = uint64_t{256} << 20;
// For the rows of a sequence beside its slices, in sums that need not be exact.
constexpr uint64_t kOtherRowBytes = 4096;
// How often a call may wait for room: others may take it again.
constexpr uint32_t kRoomAttemptsMax = 8;
// The pool is emptied from the first share to the second, of sequences unused for so long.
constexpr double kWatermarkHigh = 15.0 / 16.0;
constexpr double kWatermarkLow = 7.0 / 8.0;
constexpr uint64_t kIdleNs = 10'000'000'000;
constexpr uint64_t kWatermarkEveryNs = 100'000'000;
// Each crash raises generations by more than truncates can between two of them: a handle of before
// never fits what came back.
constexpr uint64_t kGenerationsPerCrash = uint64_t{1} << 20;

// The range of one key.
std::pair<std::string, std::string> Only(std::string key) {
  std::string end = key;
  end.push_back('\0');
  return {std::move(key), std::move(end)};
}

// What storing the rest of a sequence, or of one of its layers, adds to its rows.
uint64_t BytesToStore(const SequenceRecord& record, std::optional<uint32_t> only_layer) {
  const CacheShape& shape = record.tables->shape;
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < shape.layer_count; ++i) {
    if (only_layer.has_value() && i != *only_layer) continue;
    const uint32_t stored = record.stored == nullptr ? 0 : record.stored->layers[i].length;
    bytes += StoredLayerBytes(shape, record.cache->length(i)) - StoredLayerBytes(shape, stored);
  }
  return bytes;
}

}  // namespace

SequenceStore::SequenceStore(Parts parts)
    : parts_(std::move(parts)), evictions_(parts_.pool, parts_.table) {
  if (parts_.tier == nullptr) return;
  crash_count_ = parts_.tier->closed().crash_count;
}

SequenceStore::~SequenceStore() = default;

// ---- Recovery ----

absl::Status SequenceStore::Recover(ModelRegistry* registry) {
  if (parts_.tier == nullptr) return absl::OkStatus();
  absl::StatusOr<RecoveredStore> found = RecoverStore(*parts_.tier, registry);
  if (!found.ok()) return found.status();
  stored_models_ = std::move(found->models);
  stored_tables_ = std::move(found->tables);
  const uint64_t now_ns = parts_.clock->SteadyNowNs();
  for (RecoveredSequence& sequence : found->sequences) {
    auto record = std::make_unique<SequenceRecord>();
    record->id = sequence.identity.id;
    record->tenant = std::move(sequence.identity.tenant);
    record->request_id = std::move(sequence.identity.request_id);
    record->model = sequence.model;
    record->tables = sequence.tables;
    record->policy = std::move(sequence.identity.policy);
    record->generation = sequence.state.generation +
                         (crash_count_ - sequence.state.crash_count) * kGenerationsPerCrash;
    record->lease_ns = sequence.state.lease_ns;
    record->seeds = SeedQueries(record->model->spec.layout, record->model->spec.layer_count,
                                parts_.options->seed_bytes_per_sequence_max);
    record->residence = Residence::kDisk;
    record->is_suspended = sequence.state.is_suspended;
    record->stored = std::make_unique<StoredProgress>();
    record->stored->seed = sequence.state.identity;
    record->stored->state = sequence.state_row;
    for (const StoredLayer& layer : sequence.state.layers) {
      record->stored->layers.push_back({.length = layer.length, .full = {}, .last = layer.last});
    }
    AddBytes(*record, StoredBytes(record->tables->shape, *record->stored));
    Empty(record.get());
    parts_.table->Insert(std::move(record), now_ns);
  }
  TierBatch batch;
  for (std::string& key : found->unused_keys) batch.removed_ranges.push_back(Only(std::move(key)));
  for (const SequenceId& id : found->leftovers) {
    batch.removed_ranges.push_back(Only(StateKey(id)));
    batch.removed_ranges.push_back(Only(IdentityKey(id)));
    batch.removed_ranges.emplace_back(SliceKey(id, 0, 0), SliceKeyEnd(id));
  }
  for (const auto& [id, tenant] : found->lost) {
    if (found->newly_lost.contains(id)) {
      batch.puts.emplace_back(LostKey(id), WriteLost(id, tenant));
    }
    parts_.table->AddLost(id, tenant);
  }
  if (!batch.empty()) {
    const absl::Status status = parts_.tier->Commit({&batch, 1}, true);
    if (!status.ok()) return status;
  }
  worker_ = std::make_unique<DiskWorker>(parts_.tier.get(), 3 * parts_.options->disk_bytes_max / 2,
                                         parts_.post);
  ScrubHost* const host = this;
  scrub_ = std::make_unique<StoreScrub>(host, parts_.clock, parts_.table,
                                        parts_.options->scrub_bytes_per_s);
  return absl::OkStatus();
}

// ---- Waiting ----

void SequenceStore::RunWhenThere(Need need, std::string tenant, const SequenceId& id, Task task,
                                 bool is_again) {
  if (!enabled() || !MustWait(need, tenant, id, is_again)) return task(absl::OkStatus());
  Park(id, [this, need, tenant = std::move(tenant), id,
            task = std::move(task)](const absl::Status& admission) mutable {
    if (!admission.ok()) return task(admission);
    RunWhenThere(need, std::move(tenant), id, std::move(task), true);
  });
}

bool SequenceStore::MustWait(Need need, std::string_view tenant, const SequenceId& id,
                             bool is_again) {
  const uint64_t now_ns = parts_.clock->SteadyNowNs();
  SequenceRecord* record = parts_.table->FindAnywhere(tenant, id, now_ns);
  if (record == nullptr) return false;
  if (record->room_waits > 0) return true;
  if (record->residence == Residence::kMemory) return false;
  if (record->residence != Residence::kDisk) return true;
  if (need == Need::kSettled || record->is_suspended) return false;
  if (is_again && !record->load_status.ok()) return false;
  StartLoading(record, false, nullptr);
  // A load that fails at once lets those go on who wait, and one of them may drop the sequence.
  record = parts_.table->FindAnywhere(tenant, id, now_ns);
  return record != nullptr && record->residence == Residence::kLoading;
}

void SequenceStore::Park(const SequenceId& id, Task task) {
  if (parked_count_ >= parts_.options->queue_calls_max) {
    return task(Overloaded(parts_.options->queue_calls_max));
  }
  ++parked_count_;
  parked_[id].push_back(std::move(task));
}

void SequenceStore::ParkForRoom(Task task) {
  if (parked_count_ >= parts_.options->queue_calls_max) {
    return task(Overloaded(parts_.options->queue_calls_max));
  }
  ++parked_count_;
  parked_for_room_.push_back(std::move(task));
}

void SequenceStore::ParkForRoom(std::string_view tenant, SequenceRecord* record, Task task) {
  ++record->room_waits;
  ParkForRoom([this, owner = std::string(tenant), record,
               task = std::move(task)](absl::Status admission) mutable {
    // Whoever wants to erase it waits too.
    --record->room_waits;
    const SequenceId id = record->id;
    // They stay behind it, should it have to wait again.
    std::deque<Task> behind = TakeParked(id);
    if (admission.ok()) {
      // It may have had to leave memory itself meanwhile.
      RunWhenThere(Need::kInMemory, std::move(owner), id, std::move(task), true);
    } else {
      task(std::move(admission));
    }
    for (Task& next : behind) next(absl::OkStatus());
  });
}

std::deque<Task> SequenceStore::TakeParked(const SequenceId& id) {
  const auto found = parked_.find(id);
  if (found == parked_.end()) return {};
  std::deque<Task> tasks = std::move(found->second);
  parked_.erase(found);
  parked_count_ -= tasks.size();
  return tasks;
}

// Those that park again wait for the next arrival.
void SequenceStore::Arrived(const SequenceId& id) {
  for (Task& task : TakeParked(id)) task(absl::OkStatus());
}

void SequenceStore::RoomMade() {
  std::deque<Task> tasks = std::exchange(parked_for_room_, {});
  parked_count_ -= tasks.size();
  for (Task& task : tasks) task(absl::OkStatus());
}

bool SequenceStore::MakeRoom(const RoomAsk& ask) {
  if (!enabled() || ask.lack == Lack::kNone) return false;
  const bool is_beyond_max = ask.lack == Lack::kTenantPool;
  const size_t wanted = is_beyond_max ? parts_.pool->accounts().BeyondMax(ask.owner, ask.bytes)
                                      : parts_.pool->Shortage(ask.bytes, ask.owner);
  const auto leaving_bytes = [&] {
    return is_beyond_max ? evictions_.LeavingBytesOf(ask.owner) : evictions_.leaving_bytes();
  };
  const Evictions::Ask one = {
      .cause = is_beyond_max ? EvictionCause::kTenantMax : EvictionCause::kPoolFull,
      .owner = ask.owner,
      .keep = ask.keep};
  while (leaving_bytes() < wanted && EvictOne(one)) {
  }
  return leaving_bytes() > 0;
}

void SequenceStore::KeepWatermark() {
  if (!enabled()) return;
  const uint64_t now_ns = parts_.clock->SteadyNowNs();
  if (now_ns - watermark_checked_ns_ < kWatermarkEveryNs) return;
  watermark_checked_ns_ = now_ns;
  parts_.tenants->ForEachBeyondMax([this](BlockOwner owner) {
    MakeRoom({.bytes = 0, .lack = Lack::kTenantPool, .owner = owner});
  });
  const auto total = static_cast<double>(parts_.pool->bytes());
  const auto used = static_cast<double>(parts_.pool->bytes_used());
  if (used <= kWatermarkHigh * total || now_ns < kIdleNs) return;
  const auto wanted = static_cast<size_t>(used - kWatermarkLow * total);
  const Evictions::Ask idle = {.cause = EvictionCause::kIdle, .used_before_ns = now_ns - kIdleNs};
  while (evictions_.leaving_bytes() < wanted && EvictOne(idle)) {
  }
}

bool SequenceStore::EvictOne(const Evictions::Ask& ask) {
  SequenceRecord* const record = evictions_.Choose(ask, [this](const SequenceRecord& candidate) {
    const uint64_t bytes = BytesToStore(candidate, std::nullopt) + kOtherRowBytes;
    return parts_.tenants->CheckDisk(candidate.tenant, bytes).ok();
  });
  if (record == nullptr) return false;
  StartSaving(record, Goal::kEvict, 0, nullptr);
  if (record->residence != Residence::kSaving) return false;
  evictions_.Count(ask.cause);
  return true;
}

// ---- Writing ----

void SequenceStore::AddBytes(const SequenceRecord& record, uint64_t bytes) {
  bytes_used_ += bytes;
  parts_.tenants->AddDiskBytes(record.tenant, bytes);
}

void SequenceStore::SubtractBytes(const SequenceRecord& record, uint64_t bytes) {
  bytes_used_ -= bytes;
  parts_.tenants->SubtractDiskBytes(record.tenant, bytes);
}

absl::Status SequenceStore::CheckDisk(const SequenceRecord& record, uint64_t more_bytes) const {
  if (!worker_->healthy()) return DiskFailed();
  const absl::Status quota = parts_.tenants->CheckDisk(record.tenant, more_bytes);
  if (!quota.ok()) return quota;
  const uint64_t bytes_max = parts_.options->disk_bytes_max;
  if (bytes_used_ + more_bytes > bytes_max) return DiskFull(bytes_used_, bytes_max);
  // Dead rows that could not be compacted away.
  const uint64_t file_bytes_max = 2 * bytes_max + kFileBytesSlack;
  if (worker_->file_bytes() > file_bytes_max) {
    return DiskFull(worker_->file_bytes(), file_bytes_max);
  }
  return worker_->HasRoom(std::min<uint64_t>(more_bytes, kPieceBytes)) ? absl::OkStatus()
                                                                       : DiskBusy();
}

absl::Status SequenceStore::CheckDurable(const SequenceRecord& record, uint32_t layer,
                                         uint64_t token_count) const {
  if (!enabled()) return NoDiskTier("durability");
  const CacheShape& shape = record.tables->shape;
  const uint32_t stored = record.stored == nullptr ? 0 : record.stored->layers[layer].length;
  const uint64_t length = record.cache->length(layer) + token_count;
  if (length > parts_.options->sequence_tokens_max) return CheckWritable();  // Refused later.
  const uint64_t after = StoredLayerBytes(shape, static_cast<uint32_t>(length));
  return CheckDisk(record, after - StoredLayerBytes(shape, stored) + kOtherRowBytes);
}

absl::Status SequenceStore::CheckWritable() const {
  if (!worker_->healthy()) return DiskFailed();
  return worker_->HasRoom(0) ? absl::OkStatus() : DiskBusy();
}

void SequenceStore::Write(TierBatch batch, bool is_synced, StatusDone done) {
  ++outstanding_;
  worker_->Write(std::move(batch), is_synced,
                 [this, done = std::move(done)](absl::Status status) mutable {
                   --outstanding_;
                   done(std::move(status));
                 });
}

void SequenceStore::PutModel(const Model& model, TierBatch* batch) {
  if (!stored_models_.insert(model.fingerprint).second) return;
  const TableVersion* const first = model.tables->first();
  batch->puts.emplace_back(ModelKey(model.fingerprint),
                           WriteModel({.spec = model.spec, .table_digest = first->digest}));
  PutTables(model, first, batch);
}

void SequenceStore::PutTables(const Model& model, const TableVersion* version, TierBatch* batch) {
  if (!stored_tables_.insert({model.fingerprint, version->digest}).second) return;
  const std::vector<std::byte> encoded =
      EncodeSketchTables(model.spec.layout.head_dim, version->tables);
  const StoredTables tables = {
      .model_fingerprint = model.fingerprint,
      .version = model.tables->IndexOf(version),
      .encoded = {reinterpret_cast<const char*>(encoded.data()), encoded.size()},
      .importer = model.tables->ImporterOf(version)};
  batch->puts.emplace_back(TableKey(model.fingerprint, version->digest), WriteTables(tables));
}

std::string SequenceStore::IdentityRow(const SequenceRecord& record) {
  return WriteIdentity({.id = record.id,
                        .tenant = record.tenant,
                        .request_id = record.request_id,
                        .model_fingerprint = record.model->fingerprint,
                        .table_digest = record.tables->digest,
                        .policy = record.policy});
}

void SequenceStore::BeginStoring(SequenceRecord* record, TierBatch* batch) {
  if (record->stored != nullptr) return;
  PutModel(*record->model, batch);
  PutTables(*record->model, record->tables, batch);
  const std::string identity = IdentityRow(*record);
  record->stored = std::make_unique<StoredProgress>();
  record->stored->seed = ChecksumOfRow(identity);
  record->stored->layers.assign(record->model->spec.layer_count,
                                {.length = 0, .full = {}, .last = record->stored->seed});
  batch->puts.emplace_back(IdentityKey(record->id), identity);
}

void SequenceStore::PutState(SequenceRecord* record, bool is_suspended, TierBatch* batch) {
  StoredState state = {.id = record->id,
                       .tenant = record->tenant,
                       .identity = record->stored->seed,
                       .generation = record->generation,
                       .crash_count = crash_count_,
                       .lease_ns = record->lease_ns,
                       .is_suspended = is_suspended,
                       .layers = {}};
  for (const LayerProgress& layer : record->stored->layers) {
    state.layers.push_back({.length = layer.length, .last = layer.last});
  }
  std::string row = WriteState(state);
  record->stored->state = ChecksumOfRow(row);
  batch->puts.emplace_back(StateKey(record->id), std::move(row));
}

void SequenceStore::StoreLayerDurably(SequenceRecord* record, uint32_t layer, StatusDone done) {
  const uint32_t stored = record->stored == nullptr ? 0 : record->stored->layers[layer].length;
  const CacheShape& shape = record->tables->shape;
  const uint64_t bytes =
      StoredLayerBytes(shape, record->cache->length(layer)) - StoredLayerBytes(shape, stored);
  // What a long time in memory has left behind is too much to copy at once.
  if (bytes > kPieceBytes) return StartSaving(record, Goal::kLayer, layer, std::move(done));
  TierBatch batch;
  BeginStoring(record, &batch);
  AddBytes(*record, bytes);
  StoreLayer(record->id, shape, *record->cache, layer, SIZE_MAX, record->stored.get(), &batch);
  PutState(record, false, &batch);
  Write(std::move(batch), true, std::move(done));
}

void SequenceStore::StoreCut(SequenceRecord* record, uint32_t length, StatusDone done) {
  const CacheShape& shape = record->tables->shape;
  TierBatch batch;
  SubtractBytes(*record, StoredBytes(shape, *record->stored));
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) {
    CutLayer(record->id, shape, *record->cache, layer, length, record->stored.get(), &batch);
  }
  AddBytes(*record, StoredBytes(shape, *record->stored));
  PutState(record, false, &batch);
  Write(std::move(batch), true, std::move(done));
}

void SequenceStore::RemoveRows(const SequenceId& id, StatusDone done) {
  TierBatch batch;
  for (std::string key : {StateKey(id), IdentityKey(id), LostKey(id)}) {
    batch.removed_ranges.push_back(Only(std::move(key)));
  }
  batch.removed_ranges.emplace_back(SliceKey(id, 0, 0), SliceKeyEnd(id));
  Write(std::move(batch), true, std::move(done));
}

void SequenceStore::Remove(const SequenceRecord& record, StatusDone done) {
  SubtractBytes(record, StoredBytes(record.tables->shape, *record.stored));
  RemoveRows(record.id, std::move(done));
}

void SequenceStore::RemoveLost(const SequenceId& id, StatusDone done) {
  parts_.table->ForgetLost(id);
  RemoveRows(id, std::move(done));
}

bool SequenceStore::Expire(SequenceRecord* record) {
  const bool is_moving =
      record->residence == Residence::kSaving || record->residence == Residence::kLoading;
  if (is_moving || record->room_waits > 0) return false;
  if (record->stored == nullptr || !worker_->healthy()) return true;
  if (!worker_->HasRoom(0)) return false;
  Remove(*record, [](const absl::Status&) {});
  return true;
}

// ---- Out of memory ----

void SequenceStore::Suspend(SequenceRecord* record, StatusDone done) {
  if (record->residence == Residence::kMemory) {
    return StartSaving(record, Goal::kSuspend, 0, std::move(done));
  }
  if (record->is_suspended) return done(absl::OkStatus());
  const absl::Status status = CheckWritable();
  if (!status.ok()) return done(status);
  // All is on disk already, but for the word.
  parts_.table->SetResidence(record, Residence::kSaving);
  TierBatch batch;
  PutState(record, true, &batch);
  Write(std::move(batch), true,
        [this, record, done = std::move(done)](const absl::Status& written) mutable {
          parts_.table->SetResidence(record, Residence::kDisk);
          record->is_suspended = written.ok();
          done(written);
          Arrived(SequenceId(record->id));
        });
}

void SequenceStore::StartSaving(SequenceRecord* record, Goal goal, uint32_t layer,
                                StatusDone done) {
  const uint64_t more_bytes =
      BytesToStore(*record, goal == Goal::kLayer ? std::optional<uint32_t>(layer) : std::nullopt);
  const absl::Status status = CheckDisk(*record, more_bytes + kOtherRowBytes);
  if (!status.ok()) {
    if (done != nullptr) done(status);
    return;
  }
  // All pieces at once: others that are on their way count too.
  AddBytes(*record, more_bytes);
  auto saving = std::make_shared<Saving>();
  saving->record = record;
  saving->goal = goal;
  saving->layer = layer;
  saving->done = std::move(done);
  if (goal == Goal::kEvict || goal == Goal::kSuspend) {
    saving->leaving = evictions_.Begin(*record);
  }
  parts_.table->SetResidence(record, Residence::kSaving);
  SavePiece(std::move(saving));
}

void SequenceStore::SavePiece(std::shared_ptr<Saving> saving) {
  SequenceRecord* const record = saving->record;
  const CacheShape& shape = record->tables->shape;
  TierBatch batch;
  BeginStoring(record, &batch);
  bool is_last = true;
  for (uint32_t layer = 0; layer < shape.layer_count && is_last; ++layer) {
    if (saving->goal == Goal::kLayer && layer != saving->layer) continue;
    is_last = StoreLayer(record->id, shape, *record->cache, layer, kPieceBytes,
                         record->stored.get(), &batch);
  }
  PutState(record, is_last && saving->goal == Goal::kSuspend, &batch);
  Write(std::move(batch), is_last,
        [this, is_last, saving = std::move(saving)](const absl::Status& status) mutable {
          if (status.ok() && !is_last) return SavePiece(std::move(saving));
          FinishSaving(saving.get(), status);
        });
}

void SequenceStore::FinishSaving(Saving* saving, absl::Status status) {
  SequenceRecord* const record = saving->record;
  const SequenceId id = record->id;
  const bool leaves = saving->goal == Goal::kEvict || saving->goal == Goal::kSuspend;
  if (leaves) evictions_.End(saving->leaving);
  if (leaves && status.ok()) {
    Empty(record);
    record->load_status = absl::OkStatus();
    record->is_suspended = saving->goal == Goal::kSuspend;
    parts_.table->SetResidence(record, Residence::kDisk);
  } else {
    parts_.table->SetResidence(record, Residence::kMemory);
  }
  if (saving->goal == Goal::kKeep && !status.ok()) is_complete_ = false;
  if (saving->done != nullptr) saving->done(std::move(status));
  Arrived(id);
  if (leaves) RoomMade();
  if (saving->goal == Goal::kKeep) DrainNext();
}

// Checksums of full slices come back with the slices.
void SequenceStore::Empty(SequenceRecord* record) {
  if (record->prefix != nullptr) record->prefix->Offer(0);
  record->cache = std::make_unique<Sequence>(&record->tables->shape, parts_.pool, parts_.device,
                                             parts_.pool->OwnerOf(record->tenant));
  for (LayerProgress& layer : record->stored->layers) {
    layer.full.clear();
    layer.full.shrink_to_fit();
  }
}

// ---- Back into memory ----

void SequenceStore::Resume(SequenceRecord* record, StatusDone done) {
  if (!record->is_suspended) return done(SequenceNotSuspended());
  // A restart must not take it back.
  const absl::Status status = CheckWritable();
  if (!status.ok()) return done(status);
  StartLoading(record, true, std::move(done));
}

void SequenceStore::StartLoading(SequenceRecord* record, bool is_resume, StatusDone done) {
  auto loading = std::make_shared<Loading>();
  loading->record = record;
  loading->is_resume = is_resume;
  loading->done = std::move(done);
  loading->progress = *record->stored;
  record->load_status = absl::OkStatus();
  parts_.table->SetResidence(record, Residence::kLoading);
  TakeMemory(std::move(loading));
}

void SequenceStore::TakeMemory(std::shared_ptr<Loading> loading) {
  SequenceRecord* const record = loading->record;
  std::vector<uint32_t> lengths;
  for (const LayerProgress& layer : loading->progress.layers) lengths.push_back(layer.length);
  if (record->cache->Restore(lengths)) return LoadPiece(std::move(loading));
  const size_t bytes =
      BlockCount(loading->progress.length_max()) * record->tables->shape.block_bytes();
  const absl::Status full = NoBlockError(*parts_.pool, record->cache->owner());
  const RoomAsk ask = {
      .bytes = bytes, .lack = LackOf(full), .owner = record->cache->owner(), .keep = record};
  if (++loading->attempts > kRoomAttemptsMax || !MakeRoom(ask)) {
    return FinishLoading(loading.get(), full);
  }
  ParkForRoom([this, loading = std::move(loading)](const absl::Status& admission) mutable {
    if (!admission.ok()) return FinishLoading(loading.get(), admission);
    TakeMemory(std::move(loading));
  });
}

// The next slices, of about a piece's bytes; none at the end.
std::vector<SliceRange> SequenceStore::NextRanges(const Loading& loading) {
  const CacheShape& shape = loading.record->tables->shape;
  const auto blocks_max = static_cast<uint32_t>(
      std::max<size_t>(1, kPieceBytes / (shape.slice_bytes + shape.sketch_bytes)));
  std::vector<SliceRange> ranges;
  uint32_t taken = 0;
  uint32_t block = loading.block;
  for (uint32_t layer = loading.layer; layer < shape.layer_count && taken < blocks_max; ++layer) {
    const LayerProgress& stored = loading.progress.layers[layer];
    const uint32_t end = std::min(BlockCount(stored.length), block + blocks_max - taken);
    if (block < end) {
      ranges.push_back({.layer = layer,
                        .first_block = block,
                        .end_block = end,
                        .length = stored.length,
                        .previous = block == 0 ? loading.progress.seed : stored.full[block - 1]});
      taken += end - block;
    }
    block = 0;
  }
  return ranges;
}

void SequenceStore::LoadPiece(std::shared_ptr<Loading> loading) {
  std::vector<SliceRange> ranges = NextRanges(*loading);
  if (ranges.empty()) {
    const bool fits = FitsTheRest(*loading);
    return FinishLoading(loading.get(), fits ? absl::OkStatus() : SequenceLost());
  }
  ++outstanding_;
  const SequenceRecord& record = *loading->record;
  worker_->Read([this, loading = std::move(loading), id = record.id, shape = &record.tables->shape,
                 ranges = std::move(ranges)](const DiskTier& tier) mutable -> DiskWorker::Answer {
    std::vector<ReadSlice> slices;
    absl::Status status;
    for (const SliceRange& range : ranges) {
      if (status.ok()) status = ReadSlices(tier, id, *shape, range, &slices);
    }
    return [this, loading = std::move(loading), slices = std::move(slices),
            status = std::move(status)]() mutable {
      --outstanding_;
      PasteSlices(std::move(loading), status, slices);
    };
  });
}

void SequenceStore::PasteSlices(std::shared_ptr<Loading> loading, const absl::Status& status,
                                const std::vector<ReadSlice>& slices) {
  if (!status.ok()) return FinishLoading(loading.get(), status);
  const CacheShape& shape = loading->record->tables->shape;
  for (const ReadSlice& slice : slices) {
    const std::byte* const rows = SliceRecordPayload(const_cast<std::string*>(&slice.record));
    const size_t kv_bytes =
        size_t{slice.token_count} * shape.layout.kv_head_count * shape.layout.row_bytes();
    loading->record->cache->PasteSlice(slice.layer, slice.block, slice.token_count, rows,
                                       rows + kv_bytes);
    LayerProgress& layer = loading->progress.layers[slice.layer];
    if (slice.token_count == kBlockTokens) layer.full.push_back(slice.checksum);
    layer.last = slice.checksum;
  }
  loading->layer = slices.back().layer;
  loading->block = slices.back().block + 1;
  LoadPiece(std::move(loading));
}

// What was read ends where the sequence's row says that it ends.
bool SequenceStore::FitsTheRest(const Loading& loading) {
  const std::vector<LayerProgress>& said = loading.record->stored->layers;
  for (size_t layer = 0; layer < said.size(); ++layer) {
    if (said[layer].last != loading.progress.layers[layer].last) return false;
  }
  return true;
}

void SequenceStore::FinishLoading(Loading* loading, const absl::Status& status) {
  SequenceRecord* const record = loading->record;
  const SequenceId id = record->id;
  StatusDone done = std::move(loading->done);
  if (status.code() == absl::StatusCode::kDataLoss) {
    Lose(record);
    if (done != nullptr) done(SequenceLost());
    return Arrived(id);
  }
  if (!status.ok()) {
    Empty(record);
    record->load_status = status;
    parts_.table->SetResidence(record, Residence::kDisk);
    if (done != nullptr) done(status);
    return Arrived(id);
  }
  *record->stored = std::move(loading->progress);
  record->OfferPrefix();
  if (!loading->is_resume) {
    parts_.table->SetResidence(record, Residence::kMemory);
    return Arrived(id);
  }
  record->is_suspended = false;
  ++record->generation;
  TierBatch batch;
  PutState(record, false, &batch);
  Write(std::move(batch), true,
        [this, record, id, done = std::move(done)](const absl::Status& written) mutable {
          parts_.table->SetResidence(record, Residence::kMemory);
          done(written);
          Arrived(id);
        });
}

// Its rows stay, for whoever wants to look into it, until it is dropped.
void SequenceStore::Lose(SequenceRecord* record) {
  parts_.table->AddLost(record->id, record->tenant);
  SubtractBytes(*record, StoredBytes(record->tables->shape, *record->stored));
  TierBatch batch;
  batch.puts.emplace_back(LostKey(record->id), WriteLost(record->id, record->tenant));
  Write(std::move(batch), true, [](const absl::Status&) {});
  parts_.table->Erase(record);
}

// ---- Ending ----

void SequenceStore::BeginDrain() {
  if (!enabled()) return;
  parts_.table->ForEach([&](SequenceRecord* record) {
    if (record->residence == Residence::kMemory) to_drain_.push_back(record);
  });
  // What was used last is what will be wanted first, should there be no room for all.
  std::sort(to_drain_.begin(), to_drain_.end(),
            [](const SequenceRecord* a, const SequenceRecord* b) {
              const bool stored_a = a->stored != nullptr;
              const bool stored_b = b->stored != nullptr;
              if (stored_a != stored_b) return stored_a;
              return LastUsedNs(*a) > LastUsedNs(*b);
            });
  DrainNext();
}

void SequenceStore::DrainNext() {
  while (!to_drain_.empty()) {
    SequenceRecord* const record = to_drain_.front();
    to_drain_.pop_front();
    const bool had_rows = record->stored != nullptr;
    StartSaving(record, Goal::kKeep, 0, nullptr);
    if (record->residence == Residence::kSaving) return;
    // What is on disk of it is less than there was.
    if (had_rows) is_complete_ = false;
  }
}

Inventory SequenceStore::InventoryNow() const {
  Inventory inventory;
  parts_.table->ForEach([&](const SequenceRecord* record) {
    if (record->stored == nullptr) return;
    inventory[record->id] = {
        .tenant = record->tenant, .is_lost = false, .state = record->stored->state};
  });
  for (const auto& [id, tenant] : parts_.table->lost()) {
    inventory[id] = {.tenant = tenant, .is_lost = true, .state = {}};
  }
  return inventory;
}

absl::Status SequenceStore::Close() {
  if (!enabled()) return absl::OkStatus();
  const bool healthy = worker_->healthy();
  worker_->Stop();
  // A store that is not closed tells the next start that something is missing.
  if (!healthy || !is_complete_) return DiskFailed();
  return parts_.tier->Close(WriteInventory(InventoryNow()));
}

void SequenceStore::FillStats(EngineStats* stats) const {
  stats->sequences_lost = static_cast<uint32_t>(parts_.table->lost().size());
  stats->evictions = evictions_.totals();
  if (!enabled()) return;
  stats->sequences_on_disk = parts_.table->absent_count();
  stats->disk_bytes_used = bytes_used_;
  stats->disk_bytes_max = parts_.options->disk_bytes_max;
  stats->disk_file_bytes = worker_->file_bytes();
  stats->disk_is_healthy = worker_->healthy();
  stats->scrub = scrub_->stats();
  const ClosedStore& closed = parts_.tier->closed();
  stats->disk_was_closed = closed.is_clean || closed.crash_count == 0;
}

}  // namespace kvservice
