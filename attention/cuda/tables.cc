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

void TableCache::Clear() {
  // Codes are not checked: at the end of a process there may be no device any more.
  for (auto& [name, table] : tables_) cudaFree(table.device);
  tables_.clear();
  bytes_ = 0;
  FreeOutgrown();
}

void TableCache::FreeOutgrown() {
  for (const std::byte** table : outgrown_) cudaFree(table);
  outgrown_.clear();
}

void TableCache::Begin() {
  if (bytes_ > kBytesMax) Clear();
  FreeOutgrown();
  staging_.Reset();
}

void TableCache::Copy(absl::Span<const std::byte* const> from, size_t first,
                      std::vector<const std::byte*>* known, const std::byte** to) {
  const size_t shared = std::min(from.size(), known->size());
  while (first < shared && from[first] == (*known)[first]) ++first;
  size_t end = from.size();
  if (end <= known->size()) {
    while (end > first && from[end - 1] == (*known)[end - 1]) --end;
  }
  known->resize(from.size());
  if (first >= end) return;
  const size_t count = end - first;
  const Slot<const std::byte*> slot = staging_.Take<const std::byte*>(count);
  std::copy_n(&from[first], count, slot.host);
  std::copy_n(&from[first], count, &(*known)[first]);
  Check(
      cudaMemcpyAsync(to + first, slot.host, count * sizeof(*to), cudaMemcpyHostToDevice, stream_),
      "tables");
}

RowTables TableCache::Get(const KvView& view) {
  const size_t count = BlockCount(view.length);
  Table& table = tables_[{view.slices.data(), view.sketches.data()}];
  if (table.capacity < count) {
    if (table.device != nullptr) outgrown_.push_back(table.device);
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
  Copy(view.slices.subspan(0, count), first, &table.slices, table.device);
  Copy(view.sketches.subspan(0, count), first, &table.sketches, table.device + table.capacity);
  table.revision = view.revision;
  table.length = view.length;
  return {.view = view, .slices = table.device, .sketches = table.device + table.capacity};
}

}  // namespace kvservice::cuda
