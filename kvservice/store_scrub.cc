#include "kvservice/store_scrub.h"

#include <algorithm>
#include <utility>

#include "kvservice/engine_errors.h"
#include "kvservice/stored_rows.h"

namespace kvservice {
namespace {

// What is read at a time.
constexpr size_t kPieceBytes = size_t{4} << 20;
constexpr uint64_t kNsPerS = 1'000'000'000;
// A start has better things to do.
constexpr uint64_t kFirstPassNs = 60 * kNsPerS;
constexpr uint64_t kPassEveryNs = 3600 * kNsPerS;
// What may be read at once after as long a time without.
constexpr uint64_t kBurstNs = kNsPerS;

bool IsWhole(const absl::StatusOr<std::string>& row, const Checksum& expected) {
  return row.ok() && !Unseal(*row).empty() && ChecksumOfRow(*row) == expected;
}

bool IsDiskFailure(const absl::Status& status) {
  return !status.ok() && status.code() != absl::StatusCode::kDataLoss;
}

}  // namespace

StoreScrub::StoreScrub(ScrubHost* host, Clock* clock, SequenceTable* table, uint64_t bytes_per_s)
    : host_(host),
      clock_(clock),
      table_(table),
      bytes_per_s_(bytes_per_s),
      next_pass_ns_(clock->SteadyNowNs() + kFirstPassNs) {}

void StoreScrub::Sweep() {
  if (bytes_per_s_ == 0 || is_stopped_) return;
  if (background_.at == At::kIdle) {
    const uint64_t now_ns = clock_->SteadyNowNs();
    if (now_ns < next_pass_ns_) return;
    next_pass_ns_ = now_ns + kPassEveryNs;
    Begin(&background_);
  }
  GoOn(&background_);
}

void StoreScrub::Verify(Done done) {
  if (asked_.at != At::kIdle) return done(VerifyRunning());
  asked_.done = std::move(done);
  Begin(&asked_);
  GoOn(&asked_);
}

void StoreScrub::Stop(const absl::Status& status) {
  is_stopped_ = true;
  if (asked_.at != At::kIdle) End(&asked_, status);
}

void StoreScrub::Begin(Pass* pass) {
  pass->at = At::kRegistry;
  pass->id.reset();
  pass->in_sequence = false;
  pass->report = {};
}

void StoreScrub::GoOn(Pass* pass) {
  if (is_stopped_ || pass->is_reading) return;
  if (pass == &background_ && (!host_->IsDiskIdle() || clock_->SteadyNowNs() < next_piece_ns_)) {
    return;
  }
  if (pass->at == At::kRegistry) return ReadRegistry(pass);
  if (const SequenceRecord* const record = NextSequence(pass); record != nullptr) {
    return ReadPiece(pass, *record);
  }
  End(pass, absl::OkStatus());
}

// ---- Models and tables: without them no sequence comes back ----

void StoreScrub::ReadRegistry(Pass* pass) {
  pass->is_reading = true;
  host_->ReadForScrub(
      [this, pass, keys = host_->RegistryKeys()](const DiskTier& tier) -> DiskWorker::Answer {
        std::vector<std::string> damaged;
        absl::Status status;
        uint64_t bytes = 0;
        for (const std::string& key : keys) {
          const absl::StatusOr<std::string> row = tier.Read(key);
          if (IsDiskFailure(row.status())) status.Update(row.status());
          if (row.ok()) bytes += row->size();
          if (!row.ok() || Unseal(*row).empty()) damaged.push_back(key);
        }
        return [this, pass, bytes, status, damaged = std::move(damaged)] {
          pass->is_reading = false;
          if (is_stopped_) return;
          if (!status.ok()) return End(pass, status);
          Spend(pass, bytes);
          for (const std::string& key : damaged) {
            Count(pass, &StoreReport::rows_damaged);
            if (host_->MendRegistryRow(key)) Count(pass, &StoreReport::rows_mended);
          }
          pass->at = At::kSequences;
          GoOn(pass);
        };
      });
}

// ---- Sequences ----

// The sequence that the look is in, or the next one that has rows and stays where it is.
SequenceRecord* StoreScrub::NextSequence(Pass* pass) {
  if (pass->in_sequence) {
    SequenceRecord* const record = table_->FindById(*pass->id);
    if (record != nullptr && record->stored != nullptr) {
      if (record->residence == Residence::kMemory) return record;
      if (record->residence == Residence::kDisk && record->stored->state == pass->state) {
        return record;
      }
    }
    Leave(pass, &StoreReport::sequences_skipped);
  }
  for (SequenceRecord* record = table_->After(pass->id); record != nullptr;
       record = table_->After(pass->id)) {
    pass->id = record->id;
    if (record->stored == nullptr) continue;
    if (record->residence != Residence::kMemory && record->residence != Residence::kDisk) {
      Count(pass, &StoreReport::sequences_skipped);
      continue;
    }
    pass->in_sequence = true;
    pass->layer = pass->block = 0;
    pass->state = record->stored->state;
    return record;
  }
  return nullptr;
}

void StoreScrub::Leave(Pass* pass, uint64_t StoreReport::*as) {
  pass->in_sequence = false;
  Count(pass, as);
}

StoreScrub::Piece StoreScrub::PieceOf(Pass* pass, const SequenceRecord& record) {
  const StoredProgress& stored = *record.stored;
  Piece piece;
  piece.id = record.id;
  piece.shape = &record.tables->shape;
  piece.residence = record.residence;
  piece.has_rows = pass->layer == 0 && pass->block == 0;
  piece.state = stored.state;
  piece.identity = stored.seed;
  // Layers that end below, now or since they were cut, are done.
  while (pass->layer < stored.layers.size() &&
         BlockCount(stored.layers[pass->layer].length) <= pass->block) {
    ++pass->layer;
    pass->block = 0;
  }
  if (pass->layer < stored.layers.size()) {
    PlanSlices(stored.layers[pass->layer], record.residence == Residence::kMemory, *pass,
               stored.seed, &piece);
  }
  return piece;
}

void StoreScrub::PlanSlices(const LayerProgress& stored, bool is_in_memory, const Pass& pass,
                            const Checksum& seed, Piece* piece) {
  const auto slices_max = static_cast<uint32_t>(
      std::max<size_t>(1, kPieceBytes / (piece->shape->slice_bytes + piece->shape->sketch_bytes)));
  const uint32_t end = std::min(BlockCount(stored.length), pass.block + slices_max);
  SliceRange& range = piece->range.emplace();
  range = {.layer = pass.layer,
           .first_block = pass.block,
           .end_block = end,
           .length = stored.length,
           .previous = seed};
  if (pass.block > 0) range.previous = is_in_memory ? stored.full[pass.block - 1] : pass.previous;
  for (uint32_t block = pass.block; block < end; ++block) {
    const bool is_last = block + 1 == BlockCount(stored.length);
    std::optional<Checksum>& expected = piece->expected.emplace_back();
    if (is_last) {
      expected = stored.last;
    } else if (is_in_memory) {
      expected = stored.full[block];
    }
  }
}

void StoreScrub::ReadPiece(Pass* pass, const SequenceRecord& record) {
  pass->is_reading = true;
  host_->ReadForScrub([this, pass, piece = PieceOf(pass, record)](
                          const DiskTier& tier) mutable -> DiskWorker::Answer {
    Read(tier, &piece);
    return [this, pass, read = std::move(piece)] {
      pass->is_reading = false;
      if (!is_stopped_) Take(pass, read);
    };
  });
}

// On the disk's thread.
void StoreScrub::Read(const DiskTier& tier, Piece* piece) {
  if (piece->has_rows) {
    const absl::StatusOr<std::string> state = tier.Read(StateKey(piece->id));
    const absl::StatusOr<std::string> identity = tier.Read(IdentityKey(piece->id));
    for (const auto* row : {&state, &identity}) {
      if (IsDiskFailure(row->status())) piece->status.Update(row->status());
      if (row->ok()) piece->bytes += (*row)->size();
    }
    piece->rows_damaged =
        (IsWhole(state, piece->state) ? 0U : 1U) + (IsWhole(identity, piece->identity) ? 0U : 1U);
  }
  if (!piece->range.has_value()) return;
  std::vector<ReadSlice> slices;
  const absl::Status status = ReadSlices(tier, piece->id, *piece->shape, *piece->range, &slices);
  if (IsDiskFailure(status)) piece->status.Update(status);
  for (const ReadSlice& slice : slices) {
    const std::optional<Checksum>& expected = piece->expected[piece->whole_slices];
    if (expected.has_value() && *expected != slice.checksum) break;
    ++piece->whole_slices;
    piece->last = slice.checksum;
    piece->bytes += slice.record.size();
  }
}

void StoreScrub::Take(Pass* pass, const Piece& piece) {
  if (!piece.status.ok()) return End(pass, piece.status);
  Spend(pass, piece.bytes);
  SequenceRecord* const record = table_->FindById(piece.id);
  const bool is_there =
      record != nullptr && record->stored != nullptr && record->residence == piece.residence &&
      (piece.residence == Residence::kMemory || record->stored->state == piece.state);
  if (!is_there) {
    Leave(pass, &StoreReport::sequences_skipped);
    return GoOn(pass);
  }
  Count(pass, &StoreReport::slices_checked, piece.whole_slices);
  // A mended S row is another one.
  if (piece.rows_damaged > 0) TakeRows(pass, piece, record);
  if (!pass->in_sequence) return GoOn(pass);
  if (!piece.range.has_value()) {
    Leave(pass, &StoreReport::sequences_checked);
    return GoOn(pass);
  }
  if (piece.whole_slices < piece.expected.size()) {
    TakeDamage(pass, piece, record);
  } else {
    pass->block = piece.range->end_block;
    pass->previous = piece.last;
  }
  GoOn(pass);
}

void StoreScrub::TakeRows(Pass* pass, const Piece& piece, SequenceRecord* record) {
  // Written anew meanwhile.
  if (record->stored->state != piece.state) return;
  Count(pass, &StoreReport::rows_damaged, piece.rows_damaged);
  const absl::Status mended = host_->MendRows(record);
  if (mended.ok()) Count(pass, &StoreReport::rows_mended, piece.rows_damaged);
  if (mended.code() == absl::StatusCode::kDataLoss) return Lose(pass, record);
  pass->state = record->stored->state;
}

void StoreScrub::TakeDamage(Pass* pass, const Piece& piece, SequenceRecord* record) {
  const uint32_t layer = piece.range->layer;
  const uint32_t block = piece.range->first_block + piece.whole_slices;
  if (piece.residence == Residence::kDisk) {
    Count(pass, &StoreReport::slices_checked);
    Count(pass, &StoreReport::rows_damaged);
    return Lose(pass, record);
  }
  const LayerProgress& stored = record->stored->layers[layer];
  const Checksum& expected = *piece.expected[piece.whole_slices];
  const bool is_full = block < stored.full.size();
  const bool is_the_same = is_full
                               ? stored.full[block] == expected
                               : block + 1 == BlockCount(stored.length) && stored.last == expected;
  // Written anew or cut off meanwhile; what it is now is looked at.
  if (!is_the_same) {
    pass->block = block;
    return;
  }
  Count(pass, &StoreReport::slices_checked);
  Count(pass, &StoreReport::rows_damaged);
  if (host_->MendSlice(record, layer, block).ok()) Count(pass, &StoreReport::rows_mended);
  pass->block = block + 1;
}

// One that a call waits for to come into memory is found damaged by that.
void StoreScrub::Lose(Pass* pass, SequenceRecord* record) {
  if (record->residence == Residence::kDisk && record->room_waits == 0) {
    host_->Lose(record);
    Count(pass, &StoreReport::sequences_lost);
  }
  Leave(pass, &StoreReport::sequences_checked);
}

void StoreScrub::End(Pass* pass, const absl::Status& status) {
  pass->at = At::kIdle;
  if (status.ok()) ++stats_.passes;
  Done done = std::exchange(pass->done, nullptr);
  if (done == nullptr) return;
  if (!status.ok()) return done(status);
  done(pass->report);
}

void StoreScrub::Count(Pass* pass, uint64_t StoreReport::*what, uint64_t count) {
  pass->report.*what += count;
  stats_.report.*what += count;
}

void StoreScrub::Spend(Pass* pass, uint64_t bytes) {
  Count(pass, &StoreReport::bytes_read, bytes);
  if (pass != &background_) return;
  const uint64_t now_ns = clock_->SteadyNowNs();
  const uint64_t since_ns = now_ns - std::min(now_ns, kBurstNs);
  // Rows of a few bytes cost something too.
  const uint64_t cost_bytes = bytes + 4096;
  next_piece_ns_ = std::max(next_piece_ns_, since_ns) + cost_bytes * kNsPerS / bytes_per_s_;
}

}  // namespace kvservice
