#include "kvservice/table_versions.h"

#include <utility>

namespace kvservice {
namespace {

Sha256::Digest DigestOf(uint32_t head_dim, const std::vector<SketchTable>& tables) {
  Sha256 hash;
  hash.Update(EncodeSketchTables(head_dim, tables));
  return hash.Finish();
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
    if (known->digest == version->digest) latest_ = known.get();
  }
  if (latest_->digest == version->digest || versions_.size() >= kVersionsMax) return;
  versions_.push_back(std::move(version));
  latest_ = versions_.back().get();
}

const TableVersion* TableVersions::Import(std::vector<SketchTable> tables) {
  auto version = std::make_unique<const TableVersion>(layout_, layer_count_, std::move(tables));
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : versions_) {
    if (known->digest == version->digest) return known.get();
  }
  if (versions_.size() >= kVersionsMax) return nullptr;
  versions_.push_back(std::move(version));
  return versions_.back().get();
}

}  // namespace kvservice
