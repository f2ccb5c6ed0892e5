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

// Copies the entries from the first that differs to the last.
void TableCache::Copy(absl::Span<const std::byte* const> from, std::vector<const std::byte*>* known,
                      const std::byte** to) {
  const size_t shared = std::min(from.size(), known->size());
  // As a rule nothing has changed, which is known soonest.
  if (shared == from.size() &&
      std::memcmp(from.data(), known->data(), shared * sizeof(*known->data())) == 0) {
    return;
  }
  const auto differs =
      std::mismatch(from.begin(), from.begin() + static_cast<ptrdiff_t>(shared), known->begin());
  const auto first = static_cast<size_t>(differs.first - from.begin());
  size_t end = from.size();
  if (end <= known->size()) {
    while (end > first && from[end - 1] == (*known)[end - 1]) --end;
  }
  known->assign(from.begin(), from.end());
  if (first == end) return;
  const Slot<const std::byte*> slot = staging_.Take<const std::byte*>(end - first);
  std::copy(from.begin() + static_cast<ptrdiff_t>(first),
            from.begin() + static_cast<ptrdiff_t>(end), slot.host);
  Check(cudaMemcpyAsync(to + first, slot.host, (end - first) * sizeof(*to), cudaMemcpyHostToDevice,
                        stream_),
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
  }
  Copy(view.slices.subspan(0, count), &table.slices, table.device);
  Copy(view.sketches.subspan(0, count), &table.sketches, table.device + table.capacity);
  return {.view = view, .slices = table.device, .sketches = table.device + table.capacity};
}

}  // namespace kvservice::cuda
