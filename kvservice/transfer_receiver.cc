#include "kvservice/transfer_receiver.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "kvservice/cache/slice_record.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/row_check.h"
#include "kvservice/store_rows.h"
#include "kvservice/stored_progress.h"
#include "kvservice/tensor_check.h"

namespace kvservice {
namespace {

constexpr uint64_t kNsPerMs = 1'000'000;
// About as long as a transfer of a few GB takes.
constexpr uint32_t kReceiveRetryMs = 1000;
constexpr DType kSeedType = DType::kBfloat16;
constexpr char kRowsField[] = "slices.rows";

absl::Status NotTaken() {
  return MakeError(absl::StatusCode::kFailedPrecondition, "the server takes no transfers",
                   {.reason = "TRANSFERS_NOT_TAKEN", .field = "", .metadata = {}});
}

absl::Status Busy(uint32_t receives_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat(receives_max,
                                " sequences are on their way here, the most there "
                                "may be"),
                   {.reason = "TRANSFERS_BUSY",
                    .field = "",
                    .metadata = {{"receives_max", absl::StrCat(receives_max)}},
                    .retry_delay_ms = kReceiveRetryMs});
}

absl::Status Superseded() {
  return MakeError(absl::StatusCode::kAborted,
                   "the transfer has ended, or another attempt at it goes on",
                   {.reason = "TRANSFER_SUPERSEDED", .field = "", .metadata = {}});
}

absl::Status ModelMismatch(const std::string& name) {
  return MakeError(
      absl::StatusCode::kFailedPrecondition,
      absl::StrCat("model '", name, "' is registered with another specification here"),
      {.reason = "MODEL_MISMATCH", .field = "begin.head", .metadata = {{"model", name}}});
}

absl::Status Damaged(const char* field, const std::string& what) {
  return MakeError(absl::StatusCode::kDataLoss, absl::StrCat(what, " came damaged"),
                   {.reason = "TRANSFER_DAMAGED", .field = field, .metadata = {}});
}

absl::Status OutOfOrder(const char* field, const std::string& problem) {
  return InvalidField(field, "TRANSFER_OUT_OF_ORDER", problem);
}

absl::StatusOr<std::vector<SketchTable>> DecodeTables(const TransferTables& tables,
                                                      const ModelSpec& spec,
                                                      const Sha256::Digest& digest) {
  const auto* const bytes = reinterpret_cast<const std::byte*>(tables.encoded.data());
  Sha256 hash;
  hash.Update(absl::MakeConstSpan(bytes, tables.encoded.size()));
  auto decoded =
      DecodeSketchTables(spec.layout.head_dim, absl::MakeConstSpan(bytes, tables.encoded.size()));
  if (hash.Finish() != digest || !decoded.ok() ||
      decoded->size() != size_t{spec.layer_count} * spec.layout.kv_head_count) {
    return Damaged("tables.encoded", "the sketch tables");
  }
  return decoded;
}

// Every number a tensor of the cache may have.
absl::Status CheckRowsFinite(const TransferSlices& slices, const KvLayout& layout) {
  const TensorView rows = {
      .dtype = layout.dtype,
      .shape = {},
      .bytes = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(slices.rows.data()),
                                   slices.rows.size()),
      .field = kRowsField};
  return CheckFinite(rows, 0, slices.rows.size() / ElementBytes(layout.dtype));
}

}  // namespace

std::string TransferReceiver::RequestIdOf(const Sha256::Digest& name) {
  return absl::StrCat("transfer:", absl::BytesToHexString(absl::string_view(
                                       reinterpret_cast<const char*>(name.data()), name.size())));
}

absl::StatusOr<TransferHead> TransferReceiver::CheckHead(std::string_view tenant,
                                                         const TransferBegin& begin,
                                                         const Model** model) const {
  const EngineOptions& options = *parts_.options;
  if (options.receives_max == 0) return NotTaken();
  std::optional<TransferHead> head = ReadTransferHead(begin.head);
  if (!head.has_value()) return Damaged("begin.head", "the head");
  *model = parts_.registry->Find(head->model);
  if (*model == nullptr) return ModelNotFound(head->model);
  const ModelSpec& spec = (*model)->spec;
  if ((*model)->fingerprint != head->model_fingerprint ||
      head->lengths.size() != spec.layer_count) {
    return ModelMismatch(head->model);
  }
  absl::Status status = CheckPolicy("begin.", head->policy, spec);
  if (!status.ok()) return status;
  const uint32_t length = *std::max_element(head->lengths.begin(), head->lengths.end());
  if (length > options.sequence_tokens_max) {
    return SequenceTooLong("begin.head", length, options.sequence_tokens_max);
  }
  status = parts_.table->CheckRoom(tenant);
  if (!status.ok()) return status;
  return *std::move(head);
}

absl::StatusOr<ReceiveReply> TransferReceiver::Begin(std::string_view tenant,
                                                     const TransferBegin& begin) {
  const Model* model = nullptr;
  absl::StatusOr<TransferHead> head = CheckHead(tenant, begin, &model);
  if (!head.ok()) return head.status();
  const Sha256::Digest name = TransferName(begin.head);
  const Key key(tenant, name);
  auto found = arriving_.find(key);
  if (found == arriving_.end()) {
    if (arriving_.size() >= parts_.options->receives_max) return Busy(parts_.options->receives_max);
    Arriving arriving;
    arriving.seed = ChecksumOf(begin.head);
    arriving.layers.assign(head->lengths.size(), {.block_count = 0, .last = arriving.seed});
    arriving.record = std::make_unique<SequenceRecord>();
    arriving.record->tenant = std::string(tenant);
    arriving.record->request_id = RequestIdOf(name);
    arriving.record->model = model;
    arriving.record->tables = model->tables->Find(head->table_digest);
    arriving.record->policy = head->policy;
    arriving.head = *std::move(head);
    if (arriving.record->tables != nullptr) {
      const absl::Status status = TakeMemory(&arriving);
      if (!status.ok()) return status;
    }
    found = arriving_.emplace(key, std::move(arriving)).first;
  }
  Arriving& arriving = found->second;
  // The latest attempt's; in milliseconds until the sequence is there.
  arriving.record->lease_ns = begin.lease_ms * kNsPerMs;
  arriving.record->seeds = SeedQueries(model->spec.layout, model->spec.layer_count,
                                       parts_.options->seed_bytes_per_sequence_max);
  arriving.attempt = ++attempts_;
  arriving.used_ns = parts_.clock->SteadyNowNs();
  return ReplyOf(name, arriving);
}

absl::Status TransferReceiver::TakeMemory(Arriving* arriving) {
  const CacheShape& shape = arriving->record->tables->shape;
  auto cache = std::make_unique<Sequence>(&shape, parts_.pool, parts_.device,
                                          parts_.pool->OwnerOf(arriving->record->tenant));
  if (!cache->Restore(arriving->head.lengths)) {
    const uint32_t length =
        *std::max_element(arriving->head.lengths.begin(), arriving->head.lengths.end());
    // For the next attempt.
    const absl::Status full = NoBlockError(*parts_.pool, cache->owner());
    parts_.store->MakeRoom({.bytes = BlockCount(length) * shape.block_bytes(),
                            .lack = LackOf(full),
                            .owner = cache->owner()});
    return full;
  }
  arriving->record->cache = std::move(cache);
  return absl::OkStatus();
}

ReceiveReply TransferReceiver::ReplyOf(const Sha256::Digest& name, const Arriving& arriving) const {
  ReceiveReply reply;
  reply.attempt = {.name = name, .number = arriving.attempt};
  reply.wants_tables = arriving.record->tables == nullptr;
  reply.layers = arriving.layers;
  return reply;
}

absl::StatusOr<TransferReceiver::Arriving*> TransferReceiver::Find(std::string_view tenant,
                                                                   const TransferAttempt& attempt) {
  const auto found = arriving_.find(Key(tenant, attempt.name));
  if (found == arriving_.end() || found->second.attempt != attempt.number) return Superseded();
  found->second.used_ns = parts_.clock->SteadyNowNs();
  return &found->second;
}

absl::StatusOr<ReceiveReply> TransferReceiver::Take(std::string_view tenant,
                                                    const TransferAttempt& attempt,
                                                    const TransferTables& tables) {
  const absl::StatusOr<Arriving*> found = Find(tenant, attempt);
  if (!found.ok()) return found.status();
  SequenceRecord* const record = (*found)->record.get();
  if (record->tables != nullptr) {
    return OutOfOrder("tables", "tables came though nobody asked for them");
  }
  auto decoded = DecodeTables(tables, record->model->spec, (*found)->head.table_digest);
  absl::Status status = decoded.status();
  if (status.ok()) {
    const auto imported = record->model->tables->Import(*std::move(decoded), tenant);
    status = imported.status();
    if (imported.ok()) {
      record->tables = *imported;
      status = TakeMemory(*found);
    }
  }
  if (!status.ok()) {
    Forget(tenant, attempt);
    return status;
  }
  return ReplyOf(attempt.name, **found);
}

absl::Status TransferReceiver::CheckSlices(const Arriving& arriving,
                                           const TransferSlices& slices) const {
  if (arriving.record->cache == nullptr) return OutOfOrder("slices", "slices came before tables");
  const CacheShape& shape = arriving.record->tables->shape;
  if (slices.layer >= shape.layer_count) {
    return InvalidField(
        "slices.layer", "LAYER_OUT_OF_RANGE",
        absl::StrCat("layer is ", slices.layer, ", the model has ", shape.layer_count));
  }
  const uint32_t received = arriving.layers[slices.layer].block_count;
  if (slices.first_block != received) {
    return OutOfOrder("slices.first_block",
                      absl::StrCat("block ", slices.first_block, " of layer ", slices.layer,
                                   " came, expected ", received));
  }
  const uint32_t length = arriving.head.lengths[slices.layer];
  const uint32_t left = BlockCount(length) - received;
  if (slices.checksums.empty() || slices.checksums.size() > left) {
    return InvalidField(
        "slices.checksums", "TRANSFER_INVALID",
        absl::StrCat(slices.checksums.size(), " slices came, expected 1 to ", left));
  }
  const auto end =
      std::min<uint64_t>(length, (uint64_t{received} + slices.checksums.size()) * kBlockTokens);
  const size_t bytes = (end - uint64_t{received} * kBlockTokens) * shape.layout.kv_head_count *
                       shape.layout.row_bytes();
  if (slices.rows.size() != bytes) {
    return InvalidField(kRowsField, "TRANSFER_INVALID",
                        absl::StrCat("rows have ", slices.rows.size(), " bytes, expected ", bytes));
  }
  return CheckRowsFinite(slices, shape.layout);
}

absl::StatusOr<ReceiveReply> TransferReceiver::Take(std::string_view tenant,
                                                    const TransferAttempt& attempt,
                                                    const TransferSlices& slices) {
  const absl::StatusOr<Arriving*> found = Find(tenant, attempt);
  if (!found.ok()) return found.status();
  Arriving* const arriving = *found;
  const absl::Status checked = CheckSlices(*arriving, slices);
  if (!checked.ok()) return checked;
  const KvLayout& layout = arriving->record->tables->shape.layout;
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.row_bytes();
  arriving->record->cache->PasteRows(slices.layer, slices.first_block,
                                     static_cast<uint32_t>(slices.rows.size() / token_bytes),
                                     reinterpret_cast<const std::byte*>(slices.rows.data()));
  const absl::Status verified = Verify(*arriving, slices);
  if (!verified.ok()) {
    Forget(tenant, attempt);
    return verified;
  }
  LayerReceived& layer = arriving->layers[slices.layer];
  layer.block_count += static_cast<uint32_t>(slices.checksums.size());
  layer.last = slices.checksums.back();
  return ReplyOf(attempt.name, *arriving);
}

absl::Status TransferReceiver::Verify(const Arriving& arriving, const TransferSlices& slices) {
  const CacheShape& shape = arriving.record->tables->shape;
  Checksum previous = arriving.layers[slices.layer].last;
  scratch_.resize(shape.slice_bytes + shape.sketch_bytes);
  auto* const rows = reinterpret_cast<std::byte*>(scratch_.data());
  std::byte* const sketch = rows + shape.slice_bytes;
  for (size_t i = 0; i < slices.checksums.size(); ++i) {
    const uint32_t block = slices.first_block + static_cast<uint32_t>(i);
    const SliceIdentity identity =
        SliceIdentityOf(arriving.head.id, shape, slices.layer, block,
                        TokensOfBlock(block, arriving.head.lengths[slices.layer]), previous);
    // As it is there now, not as it came.
    arriving.record->cache->CopySlice(slices.layer, block, identity.token_count, rows, sketch);
    previous = ChecksumOfSlice(
        identity, std::string_view(scratch_).substr(0, identity.kv_bytes),
        std::string_view(scratch_).substr(shape.slice_bytes, identity.sketch_bytes));
    if (previous != slices.checksums[i]) {
      return Damaged(kRowsField, absl::StrCat("block ", block, " of layer ", slices.layer));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ReceiveReply> TransferReceiver::Take(std::string_view tenant,
                                                    const TransferAttempt& attempt,
                                                    const TransferSeeds& seeds) {
  const absl::StatusOr<Arriving*> found = Find(tenant, attempt);
  if (!found.ok()) return found.status();
  const Arriving& arriving = **found;
  const ModelSpec& spec = arriving.record->model->spec;
  if (seeds.layer >= spec.layer_count) {
    return InvalidField(
        "seeds.layer", "LAYER_OUT_OF_RANGE",
        absl::StrCat("layer is ", seeds.layer, ", the model has ", spec.layer_count));
  }
  if (ChecksumOfSeeds(seeds) != seeds.checksum) {
    Forget(tenant, attempt);
    return Damaged("seeds.queries", absl::StrCat("queries of layer ", seeds.layer));
  }
  const size_t token_floats = size_t{spec.layout.query_head_count} * spec.layout.head_dim;
  const bool ascends = std::adjacent_find(seeds.positions.begin(), seeds.positions.end(),
                                          std::greater_equal<>()) == seeds.positions.end();
  const bool fits = !seeds.positions.empty() && seeds.positions.size() <= kSeedTokensMax &&
                    ascends && seeds.positions.back() < arriving.head.lengths[seeds.layer] &&
                    arriving.record->seeds.count(seeds.layer) == 0;
  if (!fits) {
    return InvalidField("seeds.positions", "QUERY_SAMPLE_POSITIONS_INVALID",
                        absl::StrCat("seeds.positions are not 1 to ", kSeedTokensMax,
                                     " ascending positions of the layer, once"));
  }
  if (seeds.queries.size() != seeds.positions.size() * token_floats * ElementBytes(kSeedType)) {
    return InvalidField("seeds.queries", "TRANSFER_INVALID",
                        absl::StrCat("queries have ", seeds.queries.size(), " bytes"));
  }
  const auto* const bytes = reinterpret_cast<const std::byte*>(seeds.queries.data());
  const TensorView view = {.dtype = kSeedType,
                           .shape = {},
                           .bytes = absl::MakeConstSpan(bytes, seeds.queries.size()),
                           .field = "seeds.queries"};
  const size_t count = seeds.positions.size() * token_floats;
  const absl::Status finite = CheckFinite(view, 0, count);
  if (!finite.ok()) return finite;
  std::vector<float> queries(count);
  for (size_t i = 0; i < count; ++i) queries[i] = LoadElement(kSeedType, bytes, i);
  arriving.record->seeds.Add(seeds.layer, seeds.positions, queries);
  return ReplyOf(attempt.name, arriving);
}

absl::StatusOr<std::unique_ptr<SequenceRecord>> TransferReceiver::End(
    std::string_view tenant, const TransferAttempt& attempt) {
  const absl::StatusOr<Arriving*> found = Find(tenant, attempt);
  if (!found.ok()) return found.status();
  const Arriving& arriving = **found;
  for (size_t layer = 0; layer < arriving.layers.size(); ++layer) {
    const uint32_t received = arriving.layers[layer].block_count;
    const uint32_t expected = BlockCount(arriving.head.lengths[layer]);
    if (received == expected && arriving.record->cache != nullptr) continue;
    return OutOfOrder("end", absl::StrCat("layer ", layer, " has ", received, " of ", expected,
                                          " blocks at the end"));
  }
  const absl::Status room = parts_.table->CheckRoom(tenant);
  if (!room.ok()) return room;
  std::unique_ptr<SequenceRecord> record = std::move((*found)->record);
  Forget(tenant, attempt);
  return record;
}

void TransferReceiver::Forget(std::string_view tenant, const TransferAttempt& attempt) {
  const auto found = arriving_.find(Key(tenant, attempt.name));
  if (found == arriving_.end() || found->second.attempt != attempt.number) return;
  arriving_.erase(found);
}

void TransferReceiver::Sweep() {
  if (arriving_.empty()) return;
  const uint64_t now_ns = parts_.clock->SteadyNowNs();
  const uint64_t idle_ns = parts_.options->receive_idle_ms * kNsPerMs;
  for (auto next = arriving_.begin(); next != arriving_.end();) {
    next = now_ns - next->second.used_ns >= idle_ns ? arriving_.erase(next) : std::next(next);
  }
}

}  // namespace kvservice
