#include "attention/cuda/tables.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvservice::cuda {
namespace {

// More is given up as a whole: 64 layers of 32 rows of 128k tokens.
constexpr size_t kBytesMax = size_t{128} << 20;
constexpr size_t kCapacityMin = 64;

}  // namespace

TableCache::~TableCache() {
  RetireAll();
  // Codes are not checked: at the end of a process there may be no device any more.
  for (const Retired& retired : retired_) cudaFree(retired.device);
}

void TableCache::RetireAll() {
  for (const auto& [name, table] : tables_) Retire(table.device);
  tables_.clear();
  bytes_ = 0;
}

void TableCache::Begin(uint64_t number, uint64_t oldest) {
  number_ = number;
  const auto used = std::find_if(retired_.begin(), retired_.end(),
                                 [&](const Retired& retired) { return retired.number >= oldest; });
  for (auto it = retired_.begin(); it != used; ++it) Check(cudaFree(it->device), "cudaFree");
  retired_.erase(retired_.begin(), used);
  if (bytes_ > kBytesMax) RetireAll();
}

void TableCache::Copy(absl::Span<const std::byte* const> from, size_t first, Arena* staging,
                      std::vector<const std::byte*>* known, const std::byte** to) const {
  const size_t shared = std::min(from.size(), known->size());
  while (first < shared && from[first] == (*known)[first]) ++first;
  size_t end = from.size();
  if (end <= known->size()) {
    while (end > first && from[end - 1] == (*known)[end - 1]) --end;
  }
  known->resize(from.size());
  if (first >= end) return;
  const size_t count = end - first;
  const Slot<const std::byte*> slot = staging->Take<const std::byte*>(count);
  std::copy_n(&from[first], count, slot.host);
  std::copy_n(&from[first], count, &(*known)[first]);
  Check(
      cudaMemcpyAsync(to + first, slot.host, count * sizeof(*to), cudaMemcpyHostToDevice, stream_),
      "tables");
}

RowTables TableCache::Get(const KvView& view, Arena* staging) {
  const size_t count = BlockCount(view.length);
  Table& table = tables_[{view.slices.data(), view.sketches.data()}];
  if (table.capacity < count) {
    if (table.device != nullptr) Retire(table.device);
    bytes_ -= 2 * table.capacity * sizeof(*table.device);
    table.capacity = std::max(2 * count, kCapacityMin);
    const size_t bytes = 2 * table.capacity * sizeof(*table.device);
    bytes_ += bytes;
    Check(cudaMalloc(reinterpret_cast<void**>(&table.device), bytes), "cudaMalloc");
    table.slices.clear();
    table.sketches.clear();
    table.revision = 0;
  }
  const bool same = view.revision != 0 && view.revision == table.revision;
  const size_t first = same ? std::min(view.length, table.length) / kBlockTokens : 0;
  Copy(view.slices.subspan(0, count), first, staging, &table.slices, table.device);
  Copy(view.sketches.subspan(0, count), first, staging, &table.sketches,
       table.device + table.capacity);
  table.revision = view.revision;
  table.length = view.length;
  return {.view = view, .slices = table.device, .sketches = table.device + table.capacity};
}

}  // namespace kvservice::cuda
