// The versions of a model's sketch tables. A version is named by the digest of its bytes; a
// sequence and its forks keep the version that they were created with, because their sketches were
// made with it. The latest version serves new sequences.
//
// Thread-safe. Versions are never forgotten, so a pointer to one stays valid as long as the object.

#ifndef KVSERVICE_KVSERVICE_TABLE_VERSIONS_H_
#define KVSERVICE_KVSERVICE_TABLE_VERSIONS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/kv_layout.h"
#include "attention/sketch_table.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/sha256.h"

namespace kvservice {

// Immutable.
struct TableVersion {
  TableVersion(const KvLayout& layout, uint32_t layer_count, std::vector<SketchTable> tables_in);
  TableVersion(const TableVersion&) = delete;
  TableVersion& operator=(const TableVersion&) = delete;

  // [layer_count][kv_head_count], normalised.
  const std::vector<SketchTable> tables;
  // SHA-256 of their stored form (attention/sketch_table.h).
  const Sha256::Digest digest;
  // How sequences of this version lie in memory; borrows the tables.
  const CacheShape shape;
};

class TableVersions {
 public:
  // Each version holds a model's tables; a learnt one follows the first.
  static constexpr uint32_t kVersionsMax = 8;
  // Of them, those that came with sequences from elsewhere: there is always room for the learnt
  // one. And those that one tenant's sequences may bring: nobody can use up the room of all.
  static constexpr uint32_t kImportedMax = kVersionsMax - 2;
  static constexpr uint32_t kImportedPerTenantMax = 2;

  TableVersions(const KvLayout& layout, uint32_t layer_count, std::vector<SketchTable> first);

  const TableVersion* latest() const;
  const TableVersion* first() const;
  uint32_t count() const;
  // nullptr if there is no such version.
  const TableVersion* Find(const Sha256::Digest& digest) const;
  // Its place among the versions; 0 came with the model.
  uint32_t IndexOf(const TableVersion* version) const;
  // Makes tables the latest version, unless they are it already or there are kVersionsMax.
  void Add(std::vector<SketchTable> tables);
  // Makes tables known that a sequence of the tenant's from elsewhere was made with. New sequences
  // do not use them: whoever sends a sequence chooses for nobody else. RESOURCE_EXHAUSTED with
  // field tables.encoded: TENANT_QUOTA beyond kImportedPerTenantMax, TABLES_FULL beyond
  // kImportedMax or kVersionsMax.
  absl::StatusOr<const TableVersion*> Import(std::vector<SketchTable> tables,
                                             std::string_view tenant);
  // Whose sequence brought the version; "" for the model's own.
  std::string ImporterOf(const TableVersion* version) const;

 private:
  const KvLayout layout_;
  const uint32_t layer_count_;

  mutable std::mutex mutex_;
  // Guarded by mutex_. Not empty.
  std::vector<std::unique_ptr<const TableVersion>> versions_;
  std::map<const TableVersion*, std::string> importers_;
  const TableVersion* latest_ = nullptr;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TABLE_VERSIONS_H_
