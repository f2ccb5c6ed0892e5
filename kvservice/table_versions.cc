#include "kvservice/table_versions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

Sha256::Digest DigestOf(uint32_t head_dim, const std::vector<SketchTable>& tables) {
  Sha256 hash;
  hash.Update(EncodeSketchTables(head_dim, tables));
  return hash.Finish();
}

absl::Status Full(const char* reason, const char* whose, uint32_t versions_max) {
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat(whose, " ", versions_max, " versions of sketch tables, the most there may be"),
      {.reason = reason,
       .field = "tables.encoded",
       .metadata = {{"versions_max", absl::StrCat(versions_max)}}});
}

}  // namespace

TableVersion::TableVersion(const KvLayout& layout, uint32_t layer_count,
                           std::vector<SketchTable> tables_in)
    : tables(std::move(tables_in)),
      digest(DigestOf(layout.head_dim, tables)),
      shape(layout, layer_count, tables) {}

TableVersions::TableVersions(const KvLayout& layout, uint32_t layer_count,
                             std::vector<SketchTable> first)
    : layout_(layout), layer_count_(layer_count) {
  versions_.push_back(std::make_unique<const TableVersion>(layout, layer_count, std::move(first)));
  latest_ = versions_.back().get();
}

const TableVersion* TableVersions::latest() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return latest_;
}

const TableVersion* TableVersions::first() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return versions_.front().get();
}

uint32_t TableVersions::count() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint32_t>(versions_.size());
}

const TableVersion* TableVersions::Find(const Sha256::Digest& digest) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& version : versions_) {
    if (version->digest == digest) return version.get();
  }
  return nullptr;
}

uint32_t TableVersions::IndexOf(const TableVersion* version) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint32_t index = 0;
  while (index + 1 < versions_.size() && versions_[index].get() != version) ++index;
  return index;
}

void TableVersions::Add(std::vector<SketchTable> tables) {
  auto version = std::make_unique<const TableVersion>(layout_, layer_count_, std::move(tables));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (latest_->digest == version->digest) return;
  for (const auto& known : versions_) {
    // It came with a sequence from elsewhere.
    if (known->digest != version->digest) continue;
    latest_ = known.get();
    importers_.erase(latest_);
  }
  if (latest_->digest == version->digest || versions_.size() >= kVersionsMax) return;
  versions_.push_back(std::move(version));
  latest_ = versions_.back().get();
}

absl::StatusOr<const TableVersion*> TableVersions::Import(std::vector<SketchTable> tables,
                                                          std::string_view tenant) {
  auto version = std::make_unique<const TableVersion>(layout_, layer_count_, std::move(tables));
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : versions_) {
    if (known->digest == version->digest) return known.get();
  }
  const auto brought = std::count_if(importers_.begin(), importers_.end(),
                                     [&](const auto& entry) { return entry.second == tenant; });
  if (brought >= kImportedPerTenantMax) {
    return Full("TENANT_QUOTA", "the tenant's sequences brought", kImportedPerTenantMax);
  }
  if (importers_.size() >= kImportedMax || versions_.size() >= kVersionsMax) {
    return Full("TABLES_FULL", "the model has from elsewhere", kImportedMax);
  }
  versions_.push_back(std::move(version));
  importers_.emplace(versions_.back().get(), tenant);
  return versions_.back().get();
}

std::string TableVersions::ImporterOf(const TableVersion* version) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = importers_.find(version);
  return found == importers_.end() ? "" : found->second;
}

}  // namespace kvservice
