#include "kvservice/executor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/describe_block.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/explain.h"
#include "kvservice/row_check.h"
#include "kvservice/store_rows.h"
#include "kvservice/tensor_check.h"
#include "kvservice/transfer_sender.h"

namespace kvservice {
namespace {

constexpr uint32_t kRequestIdBytesMax = 64;
// Ids are 128 random bits: a second collision in a row is a broken generator.
constexpr int kIdAttemptsMax = 4;
// Bounds what one sweep adds to the latency of the call behind it.
constexpr uint32_t kSweepSequencesMax = 16;
constexpr uint64_t kNsPerMs = 1000000;
// How often a call that found the pool full waits for others to leave it.
constexpr uint32_t kRoomAttemptsMax = 8;

// The handle is one message of a request.
constexpr char kGenerationField[] = "handle.generation";

absl::Status PositionsInvalid(const std::string& problem) {
  constexpr char kField[] = "query_sample_positions";
  return InvalidField(kField, "QUERY_SAMPLE_POSITIONS_INVALID", absl::StrCat(kField, problem));
}

// Absent, or one for each of the sample's tokens, ascending, of tokens of the call.
absl::Status CheckSamplePositions(const AppendCall& call, uint64_t sample_count) {
  const absl::Span<const uint32_t> positions = call.query_sample_positions;
  if (positions.empty()) return absl::OkStatus();
  if (positions.size() != sample_count) {
    return PositionsInvalid(absl::StrCat(" has ", positions.size(), " entries, query_sample ",
                                         sample_count, " tokens"));
  }
  const uint64_t end = call.position + static_cast<uint64_t>(call.k.shape[0]);
  for (size_t i = 0; i < positions.size(); ++i) {
    const bool ascends = i == 0 || positions[i - 1] < positions[i];
    if (ascends && positions[i] >= call.position && positions[i] < end) continue;
    return PositionsInvalid(absl::StrCat(" has ", positions[i], " at ", i,
                                         ", expected ascending positions from ", call.position,
                                         " to below ", end));
  }
  return absl::OkStatus();
}

}  // namespace

Executor::Executor(const EngineOptions& options, const EngineSecrets& secrets,
                   std::unique_ptr<Device> device, std::unique_ptr<BlockPool> pool, Clock* clock,
                   Random* random, ModelRegistry* registry, std::unique_ptr<DiskTier> tier,
                   DiskWorker::Post post)
    : options_(options),
      draw_keys_(secrets.draw_secret, secrets.epoch),
      prefix_chains_(secrets.prefix_secret),
      clock_(clock),
      random_(random),
      registry_(registry),
      device_(std::move(device)),
      pool_(std::move(pool)),
      prefix_index_(options.prefix_tokens_per_tenant_max / kBlockTokens),
      table_(options.sequences_max, options.sequences_per_tenant_max),
      placement_(pool_.get(), &table_, clock),
      tenants_(&options_, pool_.get(), &table_),
      store_({.options = &options_,
              .clock = clock,
              .device = device_.get(),
              .pool = pool_.get(),
              .table = &table_,
              .tenants = &tenants_,
              .tier = std::move(tier),
              .post = std::move(post)}),
      receiver_({.options = &options_,
                 .clock = clock,
                 .device = device_.get(),
                 .pool = pool_.get(),
                 .table = &table_,
                 .store = &store_,
                 .registry = registry}),
      auditor_(&options_, secrets.audit_seed, &draw_keys_, device_.get(), &table_, &masses_),
      attend_batch_({.options = &options_,
                     .device = device_.get(),
                     .pool = pool_.get(),
                     .table = &table_,
                     .totals = &totals_,
                     .masses = &masses_,
                     .draw_keys = &draw_keys_,
                     .auditor = &auditor_}) {
  if (pool_->host_arena() == nullptr) return;
  pool_->SetRoomMaker([this](size_t bytes, BlockPool::RoomFor what) {
    if (!attend_batch_.has_begun()) placement_.MakeRoom(bytes, what);
  });
}

std::optional<SequenceId> Executor::MustWait(const AttendCall& call, bool is_again) {
  if (table_.absent_count() == 0) return std::nullopt;
  std::optional<SequenceId> first;
  // All of them, so that they come back together.
  for (const AttendCallRow& row : call.rows) {
    const bool waits =
        store_.MustWait(SequenceStore::Need::kInMemory, call.tenant, row.id, is_again);
    if (waits && !first.has_value()) first = row.id;
  }
  return first;
}

absl::StatusOr<SequenceRecord*> Executor::UseAnywhere(std::string_view tenant,
                                                      const SequenceId& id) {
  const uint64_t now_ns = clock_->SteadyNowNs();
  SequenceRecord* record = table_.FindAnywhere(tenant, id, now_ns);
  if (record == nullptr) return table_.WhyAbsent(tenant, id, now_ns);
  SequenceTable::Renew(record, now_ns);
  return record;
}

absl::StatusOr<SequenceRecord*> Executor::UseAnywhere(std::string_view tenant, const SequenceId& id,
                                                      uint64_t generation) {
  auto record = UseAnywhere(tenant, id);
  if (record.ok() && (*record)->generation != generation) {
    return GenerationMismatch(kGenerationField, generation, (*record)->generation);
  }
  return record;
}

absl::StatusOr<SequenceRecord*> Executor::Use(std::string_view tenant, const SequenceId& id) {
  auto record = UseAnywhere(tenant, id);
  if (record.ok() && (*record)->residence != Residence::kMemory) {
    return table_.WhyAbsent(tenant, id, clock_->SteadyNowNs());
  }
  return record;
}

absl::StatusOr<SequenceRecord*> Executor::Use(std::string_view tenant, const SequenceId& id,
                                              uint64_t generation) {
  auto record = Use(tenant, id);
  if (record.ok() && (*record)->generation != generation) {
    return GenerationMismatch(kGenerationField, generation, (*record)->generation);
  }
  return record;
}

uint64_t Executor::LeaseNs(uint32_t lease_ms) const {
  const uint32_t wanted_ms = lease_ms == 0 ? options_.lease_default_ms : lease_ms;
  return std::min(wanted_ms, options_.lease_max_ms) * kNsPerMs;
}

SequenceInfo Executor::Describe(const SequenceRecord& record) const {
  const uint64_t now_ns = clock_->SteadyNowNs();
  const uint64_t left_ns = record.lease_end_ns - std::min(record.lease_end_ns, now_ns);
  const bool on_disk =
      record.residence == Residence::kDisk || record.residence == Residence::kLoading;
  const StoredProgress* const stored = record.stored.get();
  return {.id = record.id,
          .generation = record.generation,
          .model = record.model->spec.name,
          .tenant = record.tenant,
          .length = on_disk ? stored->length_min() : record.cache->length_min(),
          .length_max = on_disk ? stored->length_max() : record.cache->length_max(),
          .block_count = record.cache->block_count(),
          .bytes = record.cache->bytes() + record.seeds.bytes(),
          .lease_remaining_ms = left_ns / kNsPerMs,
          .tier = on_disk ? SequenceTier::kDisk : SequenceTier::kMemory,
          .is_suspended = record.is_suspended,
          .stored_length = stored == nullptr ? 0 : stored->length_min(),
          .matched_tokens = record.matched_tokens,
          .matchable_tokens =
              record.prefix == nullptr ? 0 : record.prefix->offered_count() * kBlockTokens,
          .sketch_table_digest = record.tables->digest,
          .stats = record.stats};
}

SequenceStore::StatusDone Executor::DescribeLater(std::string_view tenant, const SequenceId& id,
                                                  Done<SequenceInfo> done) {
  return [this, owner = std::string(tenant), id,
          done = std::move(done)](const absl::Status& status) mutable {
    if (!status.ok()) return done(status);
    const auto record = UseAnywhere(owner, id);
    if (!record.ok()) return done(record.status());
    done(Describe(**record));
  };
}

bool Executor::WaitsForRoom(const absl::Status& status, uint32_t attempts, size_t bytes,
                            std::string_view tenant, const SequenceId& id, Task* task) {
  const Lack lack = LackOf(status);
  if (lack == Lack::kNone || attempts >= kRoomAttemptsMax) return false;
  SequenceRecord* const record = table_.FindAnywhere(tenant, id, clock_->SteadyNowNs());
  if (record == nullptr ||
      !store_.MakeRoom(
          {.bytes = bytes, .lack = lack, .owner = record->cache->owner(), .keep = record})) {
    return false;
  }
  store_.ParkForRoom(tenant, record, std::move(*task));
  return true;
}

absl::StatusOr<SequenceRecord*> Executor::Insert(std::unique_ptr<SequenceRecord> record) {
  for (int attempt = 0; attempt < kIdAttemptsMax; ++attempt) {
    if (!random_->Fill(absl::MakeSpan(record->id.bytes)).ok()) break;
    if (!table_.Contains(record->id)) {
      return table_.Insert(std::move(record), clock_->SteadyNowNs());
    }
  }
  return RandomUnavailable();
}

absl::StatusOr<SequenceInfo> Executor::Create(std::string_view tenant, const CreateOptions& asked,
                                              const DeclaredPrompt& prompt) {
  const Model* model = registry_->Find(asked.model);
  if (model == nullptr) return ModelNotFound(asked.model);
  const Policy& policy = asked.policy.has_value() ? *asked.policy : model->spec.default_policy;
  absl::Status status = CheckPolicy("", policy, model->spec);
  if (!status.ok()) return status;
  if (asked.request_id.size() > kRequestIdBytesMax) {
    return InvalidField("request_id", "REQUEST_ID_TOO_LONG",
                        absl::StrCat("request_id has ", asked.request_id.size(), " bytes, at most ",
                                     kRequestIdBytesMax, " are allowed"));
  }
  if (prompt.token_count > options_.sequence_tokens_max) {
    return SequenceTooLong("token_ids", prompt.token_count, options_.sequence_tokens_max);
  }
  SequenceRecord* earlier = table_.FindRequest(tenant, asked.request_id, clock_->SteadyNowNs());
  if (earlier != nullptr) return Repeat(earlier, asked, policy, prompt);
  status = table_.CheckRoom(tenant);
  if (!status.ok()) return status;

  auto record = std::make_unique<SequenceRecord>();
  record->tenant = std::string(tenant);
  record->request_id = asked.request_id;
  record->model = model;
  record->policy = policy;
  record->lease_ns = LeaseNs(asked.lease_ms);
  record->tables = prompt.tables != nullptr ? prompt.tables : model->tables->latest();
  record->prompt = prompt.checksum;
  record->cache = std::make_unique<Sequence>(&record->tables->shape, pool_.get(), device_.get(),
                                             pool_->OwnerOf(tenant));
  record->seeds = SeedQueries(model->spec.layout, model->spec.layer_count,
                              options_.seed_bytes_per_sequence_max);
  BeginWith(prefix_index_.Find(tenant, prompt.chain), record.get());
  const auto inserted = Insert(std::move(record));
  if (!inserted.ok()) return inserted.status();
  (*inserted)->prefix = prefix_index_.Declare(tenant, *inserted, prompt.chain);
  (*inserted)->OfferPrefix();
  prefix_requested_tokens_total_ += prompt.token_count;
  prefix_matched_tokens_total_ += (*inserted)->matched_tokens;
  return Describe(**inserted);
}

// The answer of the first request may have been lost: the same question gets the same sequence.
absl::StatusOr<SequenceInfo> Executor::Repeat(SequenceRecord* record, const CreateOptions& asked,
                                              const Policy& policy, const DeclaredPrompt& prompt) {
  const bool is_same = record->model->spec.name == asked.model && record->policy == policy &&
                       record->prompt.value_or(prompt.checksum) == prompt.checksum;
  if (!is_same) {
    return InvalidField("request_id", "REQUEST_ID_REUSED",
                        "request_id belongs to a sequence with another model, policy or token ids");
  }
  SequenceTable::Renew(record, clock_->SteadyNowNs());
  return Describe(*record);
}

void Executor::Fork(ForkAsk ask, Done<SequenceInfo> done) {
  const auto child = ForkNow(ask);
  if (child.ok()) return done(Describe(**child));
  const SequenceRecord* const parent = table_.Find(ask.tenant, ask.id, clock_->SteadyNowNs());
  const size_t block_bytes = parent == nullptr ? 0 : parent->tables->shape.block_bytes();
  const uint32_t attempts = ask.attempts++;
  const std::string tenant = ask.tenant;
  const SequenceId id = ask.id;
  // Shared with the task, which goes where it waits only if it waits.
  auto waiting = std::make_shared<Done<SequenceInfo>>(std::move(done));
  Task again = [this, ask = std::move(ask), waiting](const absl::Status& admission) mutable {
    if (!admission.ok()) return (*waiting)(admission);
    Fork(std::move(ask), std::move(*waiting));
  };
  if (WaitsForRoom(child.status(), attempts, block_bytes, tenant, id, &again)) return;
  (*waiting)(child.status());
}

absl::StatusOr<SequenceRecord*> Executor::ForkNow(const ForkAsk& ask) {
  const auto parent = Use(ask.tenant, ask.id, ask.generation);
  if (!parent.ok()) return parent.status();
  const uint32_t parent_length = (*parent)->cache->length_min();
  const uint32_t length = ask.length == UINT32_MAX ? parent_length : ask.length;
  if (length > parent_length) return LengthOutOfRange(length, parent_length);
  const absl::Status status = table_.CheckRoom(ask.tenant);
  if (!status.ok()) return status;

  auto child = std::make_unique<SequenceRecord>();
  child->tenant = (*parent)->tenant;
  child->model = (*parent)->model;
  child->tables = (*parent)->tables;
  child->policy = (*parent)->policy;
  child->lease_ns = LeaseNs(ask.lease_ms);
  child->cache = (*parent)->cache->Fork(length);
  if (child->cache == nullptr) return NoBlockError(*pool_, (*parent)->cache->owner());
  child->seeds = (*parent)->seeds;
  child->seeds.Truncate(length);
  const auto inserted = Insert(std::move(child));
  if (!inserted.ok() || (*parent)->prefix == nullptr) return inserted;
  // What it has of its parent's prompt it has as well as the parent, and may survive it.
  (*inserted)->prefix = prefix_index_.Declare(
      ask.tenant, *inserted, (*parent)->prefix->chain().subspan(0, length / kBlockTokens));
  (*inserted)->OfferPrefix();
  return inserted;
}

void Executor::Truncate(std::string_view tenant, const SequenceId& id, uint64_t generation,
                        uint32_t length, Done<SequenceInfo> done) {
  const auto found = Use(tenant, id, generation);
  if (!found.ok()) return done(found.status());
  SequenceRecord* const record = *found;
  const uint32_t longest = record->cache->length_max();
  if (length > longest) return done(LengthOutOfRange(length, longest));
  if (record->stored != nullptr) {
    const absl::Status status = store_.CheckWritable();
    if (!status.ok()) return done(status);
  }
  if (!record->cache->Truncate(length)) {
    return done(NoBlockError(*pool_, record->cache->owner()));
  }
  ++record->generation;
  // Other tokens may follow.
  if (record->prefix != nullptr) record->prefix->Cut(length / kBlockTokens);
  record->seeds.Truncate(length);
  // They may be of tokens that are gone.
  record->last_queries.clear();
  record->last_query_bytes = 0;
  record->deferred.clear();
  if (record->stored == nullptr) return done(Describe(*record));
  // What this call did, though others may change the sequence while the disk is waited for.
  SequenceInfo cut = Describe(*record);
  cut.stored_length = std::min(cut.stored_length, length);
  store_.StoreCut(
      record, length,
      [cut = std::move(cut), done = std::move(done)](const absl::Status& status) mutable {
        if (!status.ok()) return done(status);
        done(std::move(cut));
      });
}

absl::StatusOr<SequenceInfo> Executor::Get(std::string_view tenant, const SequenceId& id) {
  const auto record = UseAnywhere(tenant, id);
  if (!record.ok()) return record.status();
  return Describe(**record);
}

void Executor::Drop(std::string_view tenant, const SequenceId& id, Done<SequenceInfo> done) {
  const auto found = UseAnywhere(tenant, id);
  const bool is_lost = !found.ok() && table_.IsLost(tenant, id);
  if (!found.ok() && !is_lost) return done(found.status());
  SequenceInfo last;
  last.id = id;
  last.tenant = std::string(tenant);
  if (found.ok()) last = Describe(**found);
  const bool has_rows = is_lost || (*found)->stored != nullptr;
  if (has_rows) {
    const absl::Status status = store_.CheckWritable();
    if (!status.ok()) return done(status);
  }
  auto answer = [last, done = std::move(done)](const absl::Status& status) mutable {
    if (!status.ok()) return done(status);
    done(std::move(last));
  };
  if (is_lost) return store_.RemoveLost(id, std::move(answer));
  if (!has_rows) {
    table_.Erase(*found);
    return answer(absl::OkStatus());
  }
  store_.Remove(**found, std::move(answer));
  table_.Erase(*found);
}

void Executor::Suspend(std::string_view tenant, const SequenceId& id, uint64_t generation,
                       Done<SequenceInfo> done) {
  if (!store_.enabled()) return done(NoDiskTier(""));
  const auto record = UseAnywhere(tenant, id, generation);
  if (!record.ok()) return done(record.status());
  store_.Suspend(*record, DescribeLater(tenant, id, std::move(done)));
}

void Executor::Resume(std::string_view tenant, const SequenceId& id, uint64_t generation,
                      Done<SequenceInfo> done) {
  if (!store_.enabled()) return done(NoDiskTier(""));
  const auto record = UseAnywhere(tenant, id, generation);
  if (!record.ok()) return done(record.status());
  store_.Resume(*record, DescribeLater(tenant, id, std::move(done)));
}

absl::StatusOr<SequenceInfo> Executor::RenewLease(std::string_view tenant, const SequenceId& id,
                                                  uint64_t generation, uint32_t lease_ms) {
  const auto record = UseAnywhere(tenant, id, generation);
  if (!record.ok()) return record.status();
  table_.SetLease(*record, LeaseNs(lease_ms), clock_->SteadyNowNs());
  return Describe(**record);
}

absl::StatusOr<TenantUsage> Executor::SetQuota(const std::string& tenant,
                                               const std::optional<TenantQuota>& quota) {
  const absl::Status status = tenants_.SetQuota(tenant, quota);
  if (!status.ok()) return status;
  return tenants_.UsageOf(tenant);
}

std::vector<TenantUsage> Executor::ListTenants(const std::string& only, std::string_view after,
                                               uint32_t limit) const {
  if (!only.empty()) return {tenants_.UsageOf(only)};
  return tenants_.List(after, limit);
}

std::vector<SequenceInfo> Executor::List(std::string_view tenant, const SequenceId& after,
                                         uint32_t limit) {
  std::vector<SequenceInfo> listed;
  for (const SequenceRecord* record : table_.List(tenant, after, limit, clock_->SteadyNowNs())) {
    listed.push_back(Describe(*record));
  }
  return listed;
}

void Executor::Append(AppendCall call, uint32_t attempts, Done<AppendResult> done) {
  const auto found = Use(call.tenant, call.id, call.generation);
  if (!found.ok()) return done(found.status());
  SequenceRecord* const record = *found;
  const absl::Status checked = CheckAppend(call, *record);
  if (!checked.ok()) return done(checked);
  const absl::StatusOr<AppendResult> stored = StoreInMemory(call, record);
  if (stored.ok() && call.is_durable) {
    return store_.StoreLayerDurably(
        record, call.layer,
        [result = *stored, done = std::move(done)](const absl::Status& status) mutable {
          if (!status.ok()) return done(status);
          done(result);
        });
  }
  if (stored.ok() || !store_.enabled()) return done(stored);
  const size_t bytes = (BlockCount(static_cast<uint32_t>(call.k.shape[0])) + 1) *
                       record->tables->shape.block_bytes();
  const std::string tenant = call.tenant;
  const SequenceId id = call.id;
  auto waiting = std::make_shared<Done<AppendResult>>(std::move(done));
  Task again = [this, call = std::move(call), attempts,
                waiting](const absl::Status& admission) mutable {
    if (!admission.ok()) return (*waiting)(admission);
    Append(std::move(call), attempts + 1, std::move(*waiting));
  };
  if (WaitsForRoom(stored.status(), attempts, bytes, tenant, id, &again)) return;
  (*waiting)(stored.status());
}

absl::Status Executor::CheckAppend(const AppendCall& call, const SequenceRecord& record) const {
  const ModelSpec& spec = record.model->spec;
  if (call.layer >= spec.layer_count) return LayerOutOfRange(call.layer, spec.layer_count);
  TensorExpectation expected{.shape = {kAnyExtent, spec.layout.kv_head_count, spec.layout.head_dim},
                             .dtype = spec.layout.dtype};
  absl::Status status = CheckTensor(call.k, expected);
  if (!status.ok()) return status;
  expected.shape[0] = call.k.shape[0];
  status = CheckTensor(call.v, expected);
  const size_t elements = call.k.bytes.size() / ElementBytes(spec.layout.dtype);
  if (status.ok()) status = CheckFinite(call.k, 0, elements);
  if (status.ok()) status = CheckFinite(call.v, 0, elements);
  if (status.ok()) status = CheckSample(call, spec);
  if (!status.ok() || !call.is_durable) return status;
  return store_.CheckDurable(record, call.layer, static_cast<uint64_t>(call.k.shape[0]));
}

absl::StatusOr<AppendResult> Executor::StoreInMemory(const AppendCall& call,
                                                     SequenceRecord* record) {
  const uint32_t length_before = record->cache->length(call.layer);
  PendingWrites writes;
  absl::StatusOr<AppendResult> stored = StoreRows(options_, *pool_, "",
                                                  {.layer = call.layer,
                                                   .position = call.position,
                                                   .count = static_cast<uint64_t>(call.k.shape[0]),
                                                   .k = call.k.bytes.data(),
                                                   .v = call.v.bytes.data()},
                                                  record->cache.get(), &writes);
  writes.Run(record->model->spec.layout, device_.get());
  if (!stored.ok()) return stored;
  record->OfferPrefix();
  if (call.query_sample.has_value() && !stored->duplicate) {
    // The bytes may lie anywhere.
    std::vector<float> queries(call.query_sample->bytes.size() / sizeof(float));
    std::memcpy(queries.data(), call.query_sample->bytes.data(), call.query_sample->bytes.size());
    KeepSeeds(call, length_before, queries, record);
    if (record->model->learns_tables) TakeSample(call, queries, *record);
  }
  if (record->model->learns_tables) BeginLearning(*record);
  return stored;
}

// Of tokens that were there already, the sample was taken when they came. A windowed layer never
// reuses.
void Executor::KeepSeeds(const AppendCall& call, uint32_t length_before,
                         absl::Span<const float> queries, SequenceRecord* record) {
  if (record->model->layers[call.layer].sliding_window > 0) return;
  absl::Span<const uint32_t> positions = call.query_sample_positions;
  const auto old_count = static_cast<size_t>(
      std::lower_bound(positions.begin(), positions.end(), length_before) - positions.begin());
  if (old_count == positions.size()) return;
  const size_t token_floats = queries.size() / positions.size();
  record->seeds.Add(call.layer, positions.subspan(old_count),
                    queries.subspan(old_count * token_floats));
}

absl::Status Executor::CheckSample(const AppendCall& call, const ModelSpec& spec) const {
  if (!call.query_sample.has_value()) return CheckSamplePositions(call, 0);
  const TensorView& sample = *call.query_sample;
  absl::Status status = CheckTensor(
      sample, {.shape = {kAnyExtent, spec.layout.query_head_count, spec.layout.head_dim},
               .dtype = DType::kFloat32});
  if (!status.ok()) return status;
  if (sample.shape[0] > kQuerySampleTokensMax) {
    return InvalidField("query_sample", "QUERY_SAMPLE_TOO_LARGE",
                        absl::StrCat("query_sample has ", sample.shape[0], " tokens, at most ",
                                     kQuerySampleTokensMax, " are allowed"));
  }
  status = CheckSamplePositions(call, static_cast<uint64_t>(sample.shape[0]));
  return status.ok() ? CheckFinite(sample, 0, sample.bytes.size() / sizeof(float)) : status;
}

void Executor::TakeSample(const AppendCall& call, absl::Span<const float> queries,
                          const SequenceRecord& record) {
  Learning& learning = learnings_[record.model];
  const TableVersions& tables = *record.model->tables;
  if (tables.latest() != tables.first() || learning.runs) return;
  if (learning.learner == nullptr) learning.learner = std::make_unique<TableLearner>(record.model);
  learning.learner->AddQueries(call.layer, static_cast<uint32_t>(call.query_sample->shape[0]),
                               queries);
}

void Executor::BeginLearning(const SequenceRecord& record) {
  const auto found = learnings_.find(record.model);
  if (found == learnings_.end() || found->second.learner == nullptr) return;
  Learning& learning = found->second;
  if (!learning.learner->CanLearnFrom(*record.cache)) return;
  if (learning.runs) {
    // In case the other one goes before it was learnt from.
    learning.next_tenant = record.tenant;
    learning.next_sequence = record.id;
    learning.has_next = true;
    return;
  }
  learning.runs = true;
  learning.tenant = record.tenant;
  learning.sequence = record.id;
  ++learnings_running_;
}

// One table of one model. A sequence that went in between took its keys along: another one that
// sufficed meanwhile, or the next append that does, starts over.
void Executor::LearnOne() {
  for (auto& [model, learning] : learnings_) {
    if (!learning.runs) continue;
    const SequenceRecord* record =
        table_.Find(learning.tenant, learning.sequence, clock_->SteadyNowNs());
    const bool usable = record != nullptr && learning.learner->CanLearnFrom(*record->cache);
    if (!usable) learning.learner->StartOver();
    if (!usable && std::exchange(learning.has_next, false)) {
      learning.tenant = learning.next_tenant;
      learning.sequence = learning.next_sequence;
      return;
    }
    const bool finished = usable && learning.learner->LearnNext(*record->cache);
    if (finished) learning.learner.reset();
    if (finished || !usable) {
      learning.runs = false;
      --learnings_running_;
    }
    return;
  }
}

// What is on its way to or from the disk may be waited for, and that moves sequences.
bool Executor::MayBeginAttend(absl::Span<AttendCall* const> calls) const {
  if (!attend_batch_.has_begun()) return true;
  return table_.absent_count() == 0 && attend_batch_.MayBegin(calls, clock_->SteadyNowNs());
}

void Executor::BeginAttend(absl::Span<AttendCall* const> calls) {
  if (!attend_batch_.has_begun()) {
    size_t row_count = 0;
    for (const AttendCall* call : calls) row_count += call->rows.size();
    placement_.KeepRoomFor(row_count);
  }
  attend_batch_.Begin(calls, clock_->SteadyNowNs());
}

void Executor::FinishAttend(AttendBatch::Answered* answered) {
  attend_batch_.Finish(answered);
  if (!store_.enabled()) return;
  for (const AttendCall* call : answered->calls) NoteShortages(*call);
  if (!attend_batch_.has_begun()) MakeRoomForAttends();
}

void Executor::NoteShortages(const AttendCall& call) {
  for (size_t i = 0; i < call.results.size(); ++i) {
    const Lack lack = LackOf(call.results[i].status);
    if (lack != Lack::kNone) shortages_.push_back({call.tenant, call.rows[i].id, lack});
  }
}

// Rows that found the pool full were answered; when they come again others shall have left it.
void Executor::MakeRoomForAttends() {
  for (const Shortage& shortage : shortages_) {
    const SequenceRecord* const record =
        table_.Find(shortage.tenant, shortage.sequence, clock_->SteadyNowNs());
    if (record == nullptr) continue;
    store_.MakeRoom({.bytes = record->tables->shape.block_bytes(),
                     .lack = shortage.lack,
                     .owner = record->cache->owner(),
                     .keep = record});
  }
  shortages_.clear();
}

void Executor::Audit(std::string_view tenant, const SequenceId& id, const AuditAsk& ask,
                     Done<AuditReport> done) {
  const auto record = Use(tenant, id);
  if (!record.ok()) return done(record.status());
  auditor_.Audit(*record, ask, std::move(done));
}

absl::StatusOr<ExplainReport> Executor::Explain(std::string_view tenant, const SequenceId& id,
                                                ExplainAsk ask) {
  const auto record = Use(tenant, id);
  if (!record.ok()) return record.status();
  const absl::Status status = CheckExplain(**record, &ask);
  if (!status.ok()) return status;
  return kvservice::Explain(**record, ask, draw_keys_, attend_batch_.NextCallNumber(),
                            device_.get());
}

absl::StatusOr<TransferPart> Executor::Send(std::string_view tenant, const SequenceId& id,
                                            uint64_t generation, const SendAsk& ask) {
  const auto record = Use(tenant, id, generation);
  if (!record.ok()) return record.status();
  return ReadTransferPart(**record, ask);
}

absl::Status Executor::CheckAsSent(std::string_view tenant, const SequenceId& id,
                                   std::string_view head) {
  const auto record = Use(tenant, id);
  if (!record.ok()) return record.status();
  const auto now = ReadTransferPart(**record, {.part = SendAsk::Part::kBegin});
  if (!now.ok()) return now.status();
  return std::get<TransferBegin>(*now).head == head ? absl::OkStatus() : SequenceGrew();
}

absl::StatusOr<ReceiveReply> Executor::Receive(std::string_view tenant,
                                               const TransferAttempt& attempt,
                                               const TransferPart& part) {
  if (const auto* begin = std::get_if<TransferBegin>(&part)) return BeginReceive(tenant, *begin);
  if (const auto* end = std::get_if<TransferEnd>(&part)) return EndReceive(tenant, attempt, *end);
  if (const auto* tables = std::get_if<TransferTables>(&part)) {
    return receiver_.Take(tenant, attempt, *tables);
  }
  if (const auto* slices = std::get_if<TransferSlices>(&part)) {
    return receiver_.Take(tenant, attempt, *slices);
  }
  return receiver_.Take(tenant, attempt, std::get<TransferSeeds>(part));
}

// The answer to an earlier attempt's end may have been lost.
absl::StatusOr<ReceiveReply> Executor::BeginReceive(std::string_view tenant,
                                                    const TransferBegin& begin) {
  const std::string request_id = TransferReceiver::RequestIdOf(TransferName(begin.head));
  SequenceRecord* const earlier = table_.FindRequest(tenant, request_id, clock_->SteadyNowNs());
  if (earlier == nullptr) return receiver_.Begin(tenant, begin);
  SequenceTable::Renew(earlier, clock_->SteadyNowNs());
  ReceiveReply reply;
  reply.sequence = Describe(*earlier);
  return reply;
}

absl::StatusOr<ReceiveReply> Executor::EndReceive(std::string_view tenant,
                                                  const TransferAttempt& attempt,
                                                  const TransferEnd& end) {
  if (end.gives_up) {
    receiver_.Forget(tenant, attempt);
    return ReceiveReply();
  }
  absl::StatusOr<std::unique_ptr<SequenceRecord>> whole = receiver_.End(tenant, attempt);
  if (!whole.ok()) return whole.status();
  (*whole)->lease_ns = LeaseNs(static_cast<uint32_t>((*whole)->lease_ns / kNsPerMs));
  const auto inserted = Insert(*std::move(whole));
  if (!inserted.ok()) return inserted.status();
  ReceiveReply reply;
  reply.sequence = Describe(**inserted);
  return reply;
}

absl::StatusOr<BlockReport> Executor::DescribeBlock(std::string_view tenant, const SequenceId& id,
                                                    const BlockAsk& ask) {
  const auto record = Use(tenant, id);
  if (!record.ok()) return record.status();
  const absl::Status status = CheckBlock(**record, ask);
  if (!status.ok()) return status;
  return kvservice::DescribeBlock(**record, ask, device_.get());
}

absl::AnyInvocable<void()> Executor::RunBackground() {
  if (learnings_running_ > 0) LearnOne();
  if (!auditor_.HasWork()) return nullptr;
  return auditor_.RunOne(clock_->SteadyNowNs());
}

void Executor::Sweep() {
  leases_expired_total_ +=
      table_.Sweep(clock_->SteadyNowNs(), kSweepSequencesMax,
                   [this](SequenceRecord* record) { return store_.Expire(record); });
  receiver_.Sweep();
  placement_.Step();
  store_.KeepWatermark();
  store_.SweepScrub();
}

void Executor::FillStats(EngineStats* stats) const {
  stats->pool_bytes = pool_->bytes();
  stats->pool_bytes_used = pool_->bytes_used();
  if (const BlockArena* const host = pool_->host_arena(); host != nullptr) {
    stats->host_pool_bytes = host->bytes();
    stats->host_pool_bytes_used = host->bytes_used();
  }
  stats->blocks_to_host_total = pool_->moved_total(RowPlace::kHost);
  stats->blocks_to_device_total = pool_->moved_total(RowPlace::kDevice);
  stats->blocks_used = pool_->blocks_used();
  stats->sequences = table_.count();
  stats->tenants = tenants_.count();
  stats->pool_bytes_reserved = pool_->accounts().bytes_reserved();
  stats->pool_bytes_held = pool_->accounts().bytes_held();
  stats->leases_expired_total = leases_expired_total_;
  stats->prefix_requested_tokens_total = prefix_requested_tokens_total_;
  stats->prefix_matched_tokens_total = prefix_matched_tokens_total_;
  stats->prefix_declared_tokens = prefix_index_.declared_blocks() * kBlockTokens;
  store_.FillStats(stats);
  stats->attend = totals_;
  stats->audit = auditor_.stats();
}

}  // namespace kvservice
