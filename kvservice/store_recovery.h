// Reads what a disk tier has, when a server starts: models, sequences, and what was lost. Keys and
// values are not read; whatever is wrong with them shows when they are.
//
// A closed store has an inventory of its sequences, so what is missing or not as it was is known to
// be lost, and what was dropped cannot come back. A store that was not closed is taken at its word:
// the rows that are there, each whole and standing on whole ones.
//
// One thread, before the engine runs.

#ifndef KVSERVICE_KVSERVICE_STORE_RECOVERY_H_
#define KVSERVICE_KVSERVICE_STORE_RECOVERY_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/cache/disk_tier.h"
#include "kvservice/model_registry.h"
#include "kvservice/stored_rows.h"
#include "kvservice/table_versions.h"

namespace kvservice {

struct RecoveredSequence {
  StoredIdentity identity;
  StoredState state;
  Checksum state_row{};
  const Model* model = nullptr;
  const TableVersion* tables = nullptr;
};

struct RecoveredStore {
  std::vector<RecoveredSequence> sequences;
  // Whose each was.
  std::map<SequenceId, std::string, ById> lost;
  // Of `lost`, those that no row says so about yet.
  std::set<SequenceId, ById> newly_lost;
  // Sequences that have rows although they were dropped.
  std::vector<SequenceId> leftovers;
  // Rows of models and tables that somebody stands on; and keys of others.
  std::set<uint64_t> models;
  std::set<std::pair<uint64_t, Sha256::Digest>> tables;
  std::vector<std::string> unused_keys;
};

// Registers the models. DATA_LOSS / STORE_DAMAGED if it cannot be said which sequences there were,
// UNAVAILABLE / DISK_FAILED if the disk does not answer, or why a model cannot be registered.
absl::StatusOr<RecoveredStore> RecoverStore(const DiskTier& tier, ModelRegistry* registry);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_STORE_RECOVERY_H_
