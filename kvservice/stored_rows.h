// What the engine keeps in the disk tier, row by row. Slices of keys and values have their own form
// (kvservice/cache/slice_record.h); everything else is sealed with a checksum and read by parsers
// that believe nothing.
//
//     M model fingerprint            the model, without its sketch tables
//     T model, table digest          sketch tables
//     I sequence id                  what never changes of a sequence
//     S sequence id                  how far it is stored: a sequence exists if it has this row
//     L sequence id                  a sequence that was found damaged or gone, and whose it was
//     B sequence id, layer, block    a slice (numbers big endian, so that a layer is a range)
//
// Each of these rows names the one above it that it stands on: S the checksum of I, the first slice
// of each layer too; I the digest of T and the fingerprint of M.
//
// Pure functions and plain data; any thread.

#ifndef KVSERVICE_KVSERVICE_STORED_ROWS_H_
#define KVSERVICE_KVSERVICE_STORED_ROWS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvservice/cache/checksum.h"
#include "kvservice/cache/slice_record.h"
#include "kvservice/engine.h"
#include "kvservice/model.h"
#include "kvservice/sha256.h"
#include "selector/policy.h"

namespace kvservice {

inline constexpr char kModelRows[] = "M";
inline constexpr char kTableRows[] = "T";
inline constexpr char kIdentityRows[] = "I";
inline constexpr char kStateRows[] = "S";
inline constexpr char kLostRows[] = "L";

std::string ModelKey(uint64_t fingerprint);
std::string TableKey(uint64_t model_fingerprint, const Sha256::Digest& digest);
std::string IdentityKey(const SequenceId& id);
std::string StateKey(const SequenceId& id);
std::string LostKey(const SequenceId& id);
std::string SliceKey(const SequenceId& id, uint32_t layer, uint32_t block);
// Behind the last slice of a layer, and of a sequence.
std::string SliceKeyEnd(const SequenceId& id, uint32_t layer);
std::string SliceKeyEnd(const SequenceId& id);
// The id in an I, S or L key.
std::optional<SequenceId> IdOfKey(std::string_view key);

struct StoredModel {
  // Without sketch tables.
  ModelSpec spec;
  // Of the tables that it was registered with.
  Sha256::Digest table_digest{};
};

struct StoredTables {
  uint64_t model_fingerprint = 0;
  // Place among the model's versions; 0 came with the model.
  uint32_t version = 0;
  std::string encoded;  // attention/sketch_table.h
  // Whose sequence brought them from elsewhere; empty: they are the model's own.
  std::string importer = {};
};

struct StoredIdentity {
  SequenceId id;
  std::string tenant;
  std::string request_id;
  uint64_t model_fingerprint = 0;
  Sha256::Digest table_digest{};
  Policy policy;
};

struct StoredLayer {
  uint32_t length = 0;
  // Of the layer's last record; the seed if there is none.
  Checksum last{};
  friend bool operator==(const StoredLayer&, const StoredLayer&) = default;
};

struct StoredState {
  SequenceId id;
  // So that the owner of a sequence is known even where its I row is damaged.
  std::string tenant;
  // Of the I row: the seed of the slices.
  Checksum identity{};
  // The generation when the store had crashed `crash_count` times: each crash since counts one more
  // (what was only in memory may be gone).
  uint64_t generation = 0;
  uint64_t crash_count = 0;
  uint64_t lease_ns = 0;
  bool is_suspended = false;
  std::vector<StoredLayer> layers;
};

// Sealed. ReadX gives nothing unless the row is whole.
std::string WriteModel(const StoredModel& model);
std::optional<StoredModel> ReadModel(std::string_view row);
std::string WriteTables(const StoredTables& tables);
std::optional<StoredTables> ReadTables(std::string_view row);
std::string WriteIdentity(const StoredIdentity& identity);
std::optional<StoredIdentity> ReadIdentity(std::string_view row);
std::string WriteState(const StoredState& state);
std::optional<StoredState> ReadState(std::string_view row);

// The owner.
std::string WriteLost(const SequenceId& id, const std::string& tenant);
std::optional<std::string> ReadLost(const SequenceId& id, std::string_view row);

// The checksum that a sealed row ends with.
Checksum ChecksumOfRow(std::string_view row);

// What a closed store should hold: who owned each sequence, and the checksum of its S row; without
// one the sequence was lost already.
struct InventoryEntry {
  std::string tenant;
  bool is_lost = false;
  Checksum state{};
};
struct ById {
  bool operator()(const SequenceId& a, const SequenceId& b) const { return a.bytes < b.bytes; }
};
using Inventory = std::map<SequenceId, InventoryEntry, ById>;
std::string WriteInventory(const Inventory& inventory);
std::optional<Inventory> ReadInventory(std::string_view bytes);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORED_ROWS_H_
