#include "kvservice/store_recovery.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "attention/sketch_table.h"
#include "kvservice/error.h"
#include "kvservice/row_check.h"

namespace kvservice {
namespace {

absl::Status StoreDamaged(const char* what) {
  return MakeError(absl::StatusCode::kDataLoss,
                   std::string("nobody can say which sequences the store had: ") + what,
                   {.reason = "STORE_DAMAGED", .field = "", .metadata = {}});
}

std::vector<SketchTable> DecodeTables(uint32_t head_dim, const std::string& encoded) {
  auto tables = DecodeSketchTables(
      head_dim, {reinterpret_cast<const std::byte*>(encoded.data()), encoded.size()});
  return tables.ok() ? *std::move(tables) : std::vector<SketchTable>();
}

class Recovery {
 public:
  Recovery(const DiskTier& tier, ModelRegistry* registry) : tier_(tier), registry_(registry) {}

  absl::StatusOr<RecoveredStore> Run();

 private:
  absl::Status FindLost();
  absl::Status FindByInventory(const Inventory& inventory);
  absl::Status FindByRows();
  absl::Status ReadRows();
  absl::Status ReadSequence(const SequenceId& id, const std::string& state_row);
  absl::Status FindModels();
  absl::Status FindModel(uint64_t fingerprint, const std::vector<RecoveredSequence*>& sequences);
  absl::Status FindUnused();
  // OK and nothing if the row is damaged or not there.
  absl::StatusOr<std::optional<std::string>> Row(const std::string& key) const;
  void Lose(const SequenceId& id, const std::string& tenant) {
    if (found_.lost.emplace(id, tenant).second) found_.newly_lost.insert(id);
  }

  const DiskTier& tier_;
  ModelRegistry* const registry_;
  RecoveredStore found_;
  std::map<SequenceId, std::string, ById> state_rows_;
};

absl::StatusOr<std::optional<std::string>> Recovery::Row(const std::string& key) const {
  absl::StatusOr<std::string> row = tier_.Read(key);
  if (row.ok()) return std::optional(*std::move(row));
  if (row.status().code() == absl::StatusCode::kDataLoss) return std::nullopt;
  return row.status();
}

absl::Status Recovery::FindLost() {
  bool damaged = false;
  const absl::Status status =
      tier_.Scan(kLostRows, [&](absl::string_view key, absl::string_view value) {
        const std::optional<SequenceId> id = IdOfKey({key.data(), key.size()});
        std::optional<std::string> tenant;
        if (id.has_value()) tenant = ReadLost(*id, {value.data(), value.size()});
        if (tenant.has_value()) {
          found_.lost.emplace(*id, *std::move(tenant));
        } else {
          damaged = true;
        }
      });
  if (status.code() == absl::StatusCode::kUnavailable) return status;
  // With an inventory they are known all the same.
  const bool is_known = tier_.closed().is_clean;
  if ((damaged || !status.ok()) && !is_known) return StoreDamaged("rows of lost ones are damaged");
  return absl::OkStatus();
}

absl::Status Recovery::FindByInventory(const Inventory& inventory) {
  for (const auto& [id, entry] : inventory) {
    if (entry.is_lost) Lose(id, entry.tenant);
    if (found_.lost.contains(id)) continue;
    absl::StatusOr<std::optional<std::string>> row = Row(StateKey(id));
    if (!row.ok()) return row.status();
    if (row->has_value() && !Unseal(**row).empty() && ChecksumOfRow(**row) == entry.state) {
      state_rows_.emplace(id, **std::move(row));
    } else {
      Lose(id, entry.tenant);
    }
  }
  const absl::Status scanned =
      tier_.Scan(kStateRows, [&](absl::string_view key, absl::string_view) {
        const std::optional<SequenceId> id = IdOfKey({key.data(), key.size()});
        if (id.has_value() && !inventory.contains(*id)) found_.leftovers.push_back(*id);
      });
  return scanned.code() == absl::StatusCode::kUnavailable ? scanned : absl::OkStatus();
}

absl::Status Recovery::FindByRows() {
  bool damaged = false;
  const absl::Status status =
      tier_.Scan(kStateRows, [&](absl::string_view key, absl::string_view value) {
        const std::optional<SequenceId> id = IdOfKey({key.data(), key.size()});
        damaged = damaged || !id.has_value();
        if (id.has_value() && !found_.lost.contains(*id)) {
          state_rows_.emplace(*id, std::string(value));
        }
      });
  if (status.code() == absl::StatusCode::kUnavailable) return status;
  if (damaged || !status.ok()) return StoreDamaged("their rows are damaged");
  return absl::OkStatus();
}

absl::Status Recovery::ReadRows() {
  for (const auto& [id, row] : state_rows_) {
    const absl::Status status = ReadSequence(id, row);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Recovery::ReadSequence(const SequenceId& id, const std::string& state_row) {
  std::optional<StoredState> state = ReadState(state_row);
  if (!state.has_value() || !(state->id == id)) {
    return StoreDamaged("the row of a sequence is damaged");
  }
  absl::StatusOr<std::optional<std::string>> row = Row(IdentityKey(id));
  if (!row.ok()) return row.status();
  std::optional<StoredIdentity> identity;
  if (row->has_value() && ChecksumOfRow(**row) == state->identity) identity = ReadIdentity(**row);
  // A row of later than the store's counts would get a generation that a handle of before may have.
  const bool is_whole = identity.has_value() && identity->id == id &&
                        identity->tenant == state->tenant &&
                        state->crash_count <= tier_.closed().crash_count;
  if (!is_whole) {
    Lose(id, state->tenant);
    return absl::OkStatus();
  }
  RecoveredSequence sequence;
  sequence.identity = *std::move(identity);
  sequence.state = *std::move(state);
  sequence.state_row = ChecksumOfRow(state_row);
  found_.sequences.push_back(std::move(sequence));
  return absl::OkStatus();
}

absl::Status Recovery::FindModels() {
  std::map<uint64_t, std::vector<RecoveredSequence*>> by_model;
  for (RecoveredSequence& sequence : found_.sequences) {
    by_model[sequence.identity.model_fingerprint].push_back(&sequence);
  }
  for (const auto& [fingerprint, sequences] : by_model) {
    const absl::Status status = FindModel(fingerprint, sequences);
    if (!status.ok()) return status;
  }
  // Those whose model or tables were not found, or do not fit.
  const auto is_lost = [this](const RecoveredSequence& sequence) {
    const bool fits = sequence.model != nullptr && sequence.tables != nullptr &&
                      sequence.state.layers.size() == sequence.model->spec.layer_count &&
                      CheckPolicy("", sequence.identity.policy, sequence.model->spec).ok();
    if (!fits) Lose(sequence.identity.id, sequence.identity.tenant);
    return !fits;
  };
  found_.sequences.erase(std::remove_if(found_.sequences.begin(), found_.sequences.end(), is_lost),
                         found_.sequences.end());
  return absl::OkStatus();
}

// The model, and the versions of its tables that its sequences use, in their order.
absl::Status Recovery::FindModel(uint64_t fingerprint,
                                 const std::vector<RecoveredSequence*>& sequences) {
  absl::StatusOr<std::optional<std::string>> row = Row(ModelKey(fingerprint));
  if (!row.ok()) return row.status();
  std::optional<StoredModel> stored;
  if (row->has_value()) stored = ReadModel(**row);
  if (!stored.has_value()) return absl::OkStatus();
  const uint32_t head_dim = stored->spec.layout.head_dim;

  std::set<Sha256::Digest> digests = {stored->table_digest};
  for (const RecoveredSequence* sequence : sequences) {
    digests.insert(sequence->identity.table_digest);
  }
  struct Version {
    std::vector<SketchTable> tables;
    std::string importer;
  };
  std::map<uint32_t, Version> versions;
  for (const Sha256::Digest& digest : digests) {
    absl::StatusOr<std::optional<std::string>> table_row = Row(TableKey(fingerprint, digest));
    if (!table_row.ok()) return table_row.status();
    std::optional<StoredTables> tables;
    if (table_row->has_value()) tables = ReadTables(**table_row);
    if (!tables.has_value() || tables->model_fingerprint != fingerprint) continue;
    versions[tables->version] = {.tables = DecodeTables(head_dim, tables->encoded),
                                 .importer = tables->importer};
    found_.tables.insert({fingerprint, digest});
  }
  if (!versions.contains(0)) return absl::OkStatus();
  stored->spec.sketch_tables = std::move(versions[0].tables);
  versions.erase(0);
  const std::string name = stored->spec.name;
  const absl::StatusOr<uint64_t> registered = registry_->Register(std::move(stored->spec));
  // A row that a model cannot be made of was damaged before it was sealed; one that does not fit
  // this server's limits is the operator's to decide.
  if (registered.status().code() == absl::StatusCode::kInvalidArgument) return absl::OkStatus();
  if (!registered.ok()) return registered.status();
  const Model* const model = registry_->Find(name);
  if (model->fingerprint != fingerprint) return absl::OkStatus();
  found_.models.insert(fingerprint);
  for (auto& [number, version] : versions) {
    if (version.tables.empty()) continue;
    if (version.importer.empty()) {
      model->tables->Add(std::move(version.tables));
    } else {
      // Sequences whose tables there is no room for are lost, and say so.
      model->tables->Import(std::move(version.tables), version.importer).IgnoreError();
    }
  }
  for (RecoveredSequence* sequence : sequences) {
    sequence->model = model;
    sequence->tables = model->tables->Find(sequence->identity.table_digest);
  }
  return absl::OkStatus();
}

absl::Status Recovery::FindUnused() {
  absl::Status status;
  for (const char* rows : {kModelRows, kTableRows}) {
    status.Update(tier_.Scan(rows, [&](absl::string_view key, absl::string_view) {
      found_.unused_keys.emplace_back(key);
    }));
  }
  std::set<std::string> used;
  for (const uint64_t fingerprint : found_.models) used.insert(ModelKey(fingerprint));
  for (const auto& [fingerprint, digest] : found_.tables) {
    used.insert(TableKey(fingerprint, digest));
  }
  std::erase_if(found_.unused_keys, [&](const std::string& key) { return used.contains(key); });
  // Sequences that were lost with their model keep its rows as they are.
  if (!found_.lost.empty()) found_.unused_keys.clear();
  return status.code() == absl::StatusCode::kUnavailable ? status : absl::OkStatus();
}

absl::StatusOr<RecoveredStore> Recovery::Run() {
  absl::Status status = FindLost();
  if (!status.ok()) return status;
  if (tier_.closed().is_clean) {
    const std::optional<Inventory> inventory = ReadInventory(tier_.closed().inventory);
    if (!inventory.has_value()) return StoreDamaged("its inventory is damaged");
    status = FindByInventory(*inventory);
  } else {
    status = FindByRows();
  }
  if (status.ok()) status = ReadRows();
  if (status.ok()) status = FindModels();
  if (status.ok()) status = FindUnused();
  if (!status.ok()) return status;
  return std::move(found_);
}

}  // namespace

absl::StatusOr<RecoveredStore> RecoverStore(const DiskTier& tier, ModelRegistry* registry) {
  return Recovery(tier, registry).Run();
}

}  // namespace kvservice
