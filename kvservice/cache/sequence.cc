#include "kvservice/cache/sequence.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstring>
#include <utility>
#include <vector>

namespace kvservice {

void PendingWrites::Run(const KvLayout& layout, Device* device) {
  if (!appends_.empty()) device->Append(layout, appends_);
  if (!seals_.empty()) device->Seal(layout, seals_);
  appends_.clear();
  seals_.clear();
}

Sequence::Sequence(const CacheShape* shape, BlockPool* pool, Device* device, BlockOwner owner)
    : shape_(shape), pool_(pool), device_(device), owner_(owner), layers_(shape->layer_count) {}

Sequence::~Sequence() = default;

uint32_t Sequence::length_min() const {
  uint32_t length = UINT32_MAX;
  for (const Layer& layer : layers_) length = std::min(length, layer.length);
  return length;
}

uint32_t Sequence::length_max() const {
  uint32_t length = 0;
  for (const Layer& layer : layers_) length = std::max(length, layer.length);
  return length;
}

size_t Sequence::bytes() const { return blocks_.size() * shape_->block_bytes() + list_bytes_; }

AppendOutcome Sequence::Append(uint32_t layer, uint32_t position, uint32_t count,
                               const std::byte* k, const std::byte* v) {
  PendingWrites writes;
  const AppendOutcome outcome = Append(layer, position, count, k, v, &writes);
  writes.Run(shape_->layout, device_);
  return outcome;
}

AppendOutcome Sequence::Append(uint32_t layer, uint32_t position, uint32_t count,
                               const std::byte* k, const std::byte* v, PendingWrites* writes) {
  const uint32_t old_length = layers_[layer].length;
  assert(count > 0 && position <= UINT32_MAX - count);
  if (position > old_length) return AppendOutcome::kGap;
  const uint32_t stored = std::min(count, old_length - position);
  if (stored > 0) writes->Run(shape_->layout, device_);
  if (!EqualsStored(layer, position, stored, k, v)) return AppendOutcome::kConflict;
  if (stored == count) return AppendOutcome::kDuplicate;
  if (!Reserve(BlockCount(position + count))) return AppendOutcome::kPoolFull;
  const size_t skipped_bytes =
      static_cast<size_t>(stored) * shape_->layout.kv_head_count * shape_->layout.vector_bytes();
  Write(layer, old_length, count - stored, k + skipped_bytes, v + skipped_bytes, writes);
  layers_[layer].length = position + count;
  SealFull(layer, old_length, writes);
  return AppendOutcome::kStored;
}

bool Sequence::EqualsStored(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
                            const std::byte* v) const {
  const KvLayout& layout = shape_->layout;
  const size_t vector_bytes = layout.vector_bytes();
  const uint32_t heads = layout.kv_head_count;
  if (count == 0) return true;
  // Rows may lie where only the device can read them. Those of a block and head are contiguous.
  std::vector<std::byte> rows(size_t{count} * heads * layout.row_bytes());
  std::vector<MemoryCopy> copies;
  std::byte* to = rows.data();
  for (uint32_t token = 0; token < count;) {
    const uint32_t first = (position + token) % kBlockTokens;
    const uint32_t part = std::min(count - token, kBlockTokens - first);
    const std::byte* slice = Slice(layer, (position + token) / kBlockTokens);
    for (uint32_t head = 0; head < heads; ++head, to += size_t{part} * layout.row_bytes()) {
      copies.push_back({slice + layout.RowOffset(head, first), to, part * layout.row_bytes()});
    }
    token += part;
  }
  device_->Copy(copies);
  uint32_t begin = 0;  // of the block's tokens
  for (size_t i = 0; i < copies.size(); ++i) {
    const auto part = static_cast<uint32_t>(copies[i].bytes / layout.row_bytes());
    for (uint32_t token = 0; token < part; ++token) {
      const std::byte* row = copies[i].to + size_t{token} * layout.row_bytes();
      const size_t at = (size_t{begin + token} * heads + i % heads) * vector_bytes;
      if (std::memcmp(row, k + at, vector_bytes) != 0) return false;
      if (std::memcmp(row + vector_bytes, v + at, vector_bytes) != 0) return false;
    }
    if (i % heads == heads - 1) begin += part;
  }
  return true;
}

bool Sequence::Reserve(uint32_t block_count) {
  const size_t old_count = blocks_.size();
  while (blocks_.size() < block_count) {
    BlockRef block = pool_->Allocate(shape_->block(), owner_);
    if (!block) {
      blocks_.erase(blocks_.begin() + static_cast<ptrdiff_t>(old_count), blocks_.end());
      return false;
    }
    blocks_.push_back(std::move(block));
  }
  return true;
}

void Sequence::Write(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
                     const std::byte* v, PendingWrites* writes) const {
  const size_t token_bytes =
      static_cast<size_t>(shape_->layout.kv_head_count) * shape_->layout.vector_bytes();
  while (count > 0) {
    const uint32_t block = position / kBlockTokens;
    const uint32_t first = position % kBlockTokens;
    const uint32_t part = std::min(count, kBlockTokens - first);
    assert(!blocks_[block].shared());
    writes->appends_.push_back(
        {.slice = Slice(layer, block), .first = first, .token_count = part, .k = k, .v = v});
    position += part;
    count -= part;
    k += part * token_bytes;
    v += part * token_bytes;
  }
}

void Sequence::SealFull(uint32_t layer, uint32_t old_length, PendingWrites* writes) const {
  const uint32_t full_end = layers_[layer].length / kBlockTokens;
  for (uint32_t block = old_length / kBlockTokens; block < full_end; ++block) {
    writes->seals_.push_back(SealOf(layer, block));
  }
}

SealSlice Sequence::SealOf(uint32_t layer, uint32_t block) const {
  return {.slice = Slice(layer, block),
          .sketch = Sketch(layer, block),
          .block_index = block,
          .tables = shape_->TablesOf(layer)};
}

uint32_t Sequence::MovableEnd() const {
  const uint32_t full_count = length_min() / kBlockTokens;
  return std::max(host_end_, full_count - std::min(full_count, kRecentBlocks));
}

// Of these blocks, ascending towards the host and descending towards the device. Returns how many
// are there now before the first that found no room.
uint32_t Sequence::Move(uint32_t first, uint32_t end, RowPlace to) {
  std::vector<const BlockRef*> moved;
  for (uint32_t block = first; block < end; ++block) moved.push_back(&blocks_[block]);
  if (to == RowPlace::kDevice) std::reverse(moved.begin(), moved.end());
  return static_cast<uint32_t>(pool_->Move(moved, to));
}

bool Sequence::MoveToHost(size_t bytes) {
  const size_t row_bytes = shape_->block().rows;
  const size_t wanted = std::min((bytes + row_bytes - 1) / row_bytes, movable_bytes() / row_bytes);
  const uint32_t count =
      Move(host_end_, host_end_ + static_cast<uint32_t>(wanted), RowPlace::kHost);
  host_end_ += count;
  return count > 0;
}

bool Sequence::MoveToDevice(size_t bytes) {
  const size_t row_bytes = shape_->block().rows;
  const size_t wanted =
      std::min<size_t>((bytes + row_bytes - 1) / row_bytes, host_end_ - kHostBegin);
  const uint32_t count =
      Move(host_end_ - static_cast<uint32_t>(wanted), host_end_, RowPlace::kDevice);
  host_end_ -= count;
  return count > 0;
}

// Those that are there already count for Move, and do not for these.
bool Sequence::MoveAllToHost() {
  const uint64_t moves = pool_->moves();
  Move(0, block_count(), RowPlace::kHost);
  if (pool_->moves() == moves) return false;
  host_end_ = MovableEnd();
  return true;
}

bool Sequence::MoveStepRowsToDevice() {
  const uint64_t moves = pool_->moves();
  const uint32_t end = block_count();
  Move(std::min(MovableEnd(), end), end, RowPlace::kDevice);
  Move(0, std::min(kHostBegin, end), RowPlace::kDevice);
  return pool_->moves() != moves;
}

bool Sequence::HasStepRowsOn(RowPlace place) const {
  for (uint32_t block = 0; block < block_count(); ++block) {
    if (block == kHostBegin) block = std::max(block, MovableEnd());
    if (block < block_count() && blocks_[block].place() == place) return true;
  }
  return false;
}

void Sequence::ReadRows(uint32_t layer, uint32_t block, uint32_t kv_head, std::byte* rows) const {
  const KvLayout& layout = shape_->layout;
  const MemoryCopy copy{Slice(layer, block) + layout.RowOffset(kv_head, 0), rows,
                        size_t{kBlockTokens} * layout.row_bytes()};
  device_->Copy({&copy, 1});
}

KvView Sequence::View(uint32_t layer, uint32_t length, ViewArrays* arrays) const {
  Show(layer, length, 0, arrays);
  return {.slices = arrays->slices, .sketches = arrays->sketches, .length = length};
}

KvView Sequence::View(uint32_t layer, uint32_t length) {
  Layer& state = layers_[layer];
  const uint32_t sealed_count = length / kBlockTokens;
  if (std::exchange(state.moves, pool_->moves()) != pool_->moves()) {
    state.shown_sealed = 0;
    state.revision = 0;
  }
  Show(layer, length, std::min(state.shown_sealed, sealed_count), &state.view);
  state.shown_sealed = sealed_count;
  // Never the same again in this process, whatever happens to the arrays' addresses.
  static std::atomic<uint64_t> revisions{0};
  if (state.revision == 0) state.revision = ++revisions;
  return {.slices = state.view.slices,
          .sketches = state.view.sketches,
          .length = length,
          .revision = state.revision};
}

// Entries of the first `length` tokens' blocks, from `first_block` on.
void Sequence::Show(uint32_t layer, uint32_t length, uint32_t first_block,
                    ViewArrays* arrays) const {
  assert(length <= layers_[layer].length);
  const uint32_t block_count = BlockCount(length);
  const uint32_t sealed_count = length / kBlockTokens;
  arrays->slices.resize(block_count);
  arrays->sketches.resize(block_count);
  for (uint32_t block = first_block; block < block_count; ++block) {
    arrays->slices[block] = Slice(layer, block);
    arrays->sketches[block] = block < sealed_count ? Sketch(layer, block) : nullptr;
  }
}

BlockRef Sequence::CopyBlock(const BlockRef& block, uint32_t token_count) const {
  BlockRef copy = pool_->Allocate(shape_->block(), owner_);
  if (!copy) return copy;
  const KvLayout& layout = shape_->layout;
  const size_t bytes = static_cast<size_t>(token_count) * layout.row_bytes();
  std::vector<MemoryCopy> copies;
  copies.reserve(size_t{shape_->layer_count} * layout.kv_head_count);
  for (uint32_t layer = 0; layer < shape_->layer_count; ++layer) {
    for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
      const size_t offset = shape_->SliceOffset(layer) + layout.RowOffset(head, 0);
      copies.push_back({block.rows() + offset, copy.rows() + offset, bytes});
    }
  }
  device_->Copy(copies);
  return copy;
}

template <typename Copy>
void Sequence::ForEachPart(uint32_t layer, uint32_t block, uint32_t token_count, Copy copy) const {
  const KvLayout& layout = shape_->layout;
  std::byte* const slice = Slice(layer, block);
  if (token_count == kBlockTokens) return copy(slice, size_t{0}, shape_->slice_bytes);
  const size_t head_bytes = size_t{token_count} * layout.row_bytes();
  for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
    copy(slice + layout.RowOffset(head, 0), head * head_bytes, head_bytes);
  }
}

void Sequence::CopySlice(uint32_t layer, uint32_t block, uint32_t token_count, std::byte* rows,
                         std::byte* sketch) const {
  absl::InlinedVector<MemoryCopy, 8> copies;
  ForEachPart(layer, block, token_count, [&](const std::byte* at, size_t offset, size_t bytes) {
    copies.push_back({at, rows + offset, bytes});
  });
  if (token_count == kBlockTokens) {
    copies.push_back({Sketch(layer, block), sketch, shape_->sketch_bytes});
  }
  device_->Copy(copies);
}

bool Sequence::Restore(absl::Span<const uint32_t> lengths) {
  assert(blocks_.empty() && lengths.size() == layers_.size());
  if (!Reserve(BlockCount(*std::max_element(lengths.begin(), lengths.end())))) return false;
  for (size_t layer = 0; layer < lengths.size(); ++layer) layers_[layer].length = lengths[layer];
  return true;
}

void Sequence::PasteSlice(uint32_t layer, uint32_t block, uint32_t token_count,
                          const std::byte* rows, const std::byte* sketch) {
  absl::InlinedVector<MemoryCopy, 8> copies;
  ForEachPart(layer, block, token_count, [&](std::byte* at, size_t offset, size_t bytes) {
    copies.push_back({rows + offset, at, bytes});
  });
  if (token_count == kBlockTokens) {
    copies.push_back({sketch, Sketch(layer, block), shape_->sketch_bytes});
  }
  device_->Copy(copies);
}

void Sequence::PasteRows(uint32_t layer, uint32_t first_block, uint32_t token_count,
                         const std::byte* rows) {
  absl::InlinedVector<MemoryCopy, 8> copies;
  absl::InlinedVector<SealSlice, 2> seals;
  const size_t token_bytes = size_t{shape_->layout.kv_head_count} * shape_->layout.row_bytes();
  for (uint32_t block = first_block; token_count > 0; ++block) {
    const uint32_t part = std::min(token_count, kBlockTokens);
    ForEachPart(layer, block, part, [&](std::byte* at, size_t offset, size_t bytes) {
      copies.push_back({rows + offset, at, bytes});
    });
    if (part == kBlockTokens) seals.push_back(SealOf(layer, block));
    token_count -= part;
    rows += part * token_bytes;
  }
  device_->Copy(copies);
  if (!seals.empty()) device_->Seal(shape_->layout, seals);
}

std::unique_ptr<Sequence> Sequence::Fork(uint32_t length) const {
  assert(length <= length_min());
  auto child = std::make_unique<Sequence>(shape_, pool_, device_, owner_);
  const uint32_t full_count = length / kBlockTokens;
  child->blocks_.reserve(BlockCount(length));
  child->host_end_ = std::clamp(full_count, kHostBegin, host_end_);
  for (uint32_t block = 0; block < full_count; ++block) {
    child->blocks_.push_back(blocks_[block].Share());
  }
  if (length % kBlockTokens != 0) {
    BlockRef partial = CopyBlock(blocks_[full_count], length % kBlockTokens);
    if (!partial) return nullptr;
    child->blocks_.push_back(std::move(partial));
  }
  for (uint32_t i = 0; i < shape_->layer_count; ++i) {
    Layer& layer = child->layers_[i];
    // Lists that know later tokens than the child has stay behind: they are a cache.
    if (layers_[i].lists_length <= length) {
      layer.lists = layers_[i].lists;
      layer.anchors_max = layers_[i].anchors_max;
      layer.lists_length = layers_[i].lists_length;
      layer.list_bytes = layers_[i].list_bytes;
    }
    layer.length = length;
    child->list_bytes_ += layer.list_bytes;
  }
  return child;
}

bool Sequence::Truncate(uint32_t length) {
  if (length >= length_max()) return true;
  const uint32_t block_count = BlockCount(length);
  const uint32_t partial_tokens = length % kBlockTokens;
  if (partial_tokens != 0 && blocks_[block_count - 1].shared()) {
    BlockRef copy = CopyBlock(blocks_[block_count - 1], partial_tokens);
    if (!copy) return false;
    blocks_[block_count - 1] = std::move(copy);
  }
  blocks_.erase(blocks_.begin() + block_count, blocks_.end());
  host_end_ = std::clamp(length / kBlockTokens, kHostBegin, host_end_);
  for (uint32_t i = 0; i < shape_->layer_count; ++i) {
    Layer& layer = layers_[i];
    layer.length = std::min(layer.length, length);
    layer.shown_sealed = std::min(layer.shown_sealed, length / kBlockTokens);
    layer.revision = 0;
    if (layer.lists == nullptr || layer.lists_length <= length) continue;
    if (layer.lists.use_count() > 1) {
      DropLists(i);
    } else {
      layer.lists->Truncate(length);
      ListsUsed(i, length);
    }
  }
  return true;
}

TokenLists* Sequence::ListsFor(uint32_t layer, uint32_t length, uint32_t anchors_max) {
  Layer& state = layers_[layer];
  if (state.lists != nullptr && state.anchors_max != anchors_max) DropLists(layer);
  if (state.lists == nullptr) {
    state.lists = device_->NewTokenLists(shape_->layout, anchors_max);
    state.anchors_max = anchors_max;
  } else if (state.lists.use_count() > 1) {
    state.lists = state.lists->Copy();
  }
  if (state.lists_length > length) {
    state.lists->Truncate(length);
    state.lists_length = length;
  }
  return state.lists.get();
}

void Sequence::ListsUsed(uint32_t layer, uint32_t length) {
  Layer& state = layers_[layer];
  state.lists_length = length;
  list_bytes_ -= state.list_bytes;
  state.list_bytes = state.lists == nullptr ? 0 : state.lists->bytes();
  list_bytes_ += state.list_bytes;
}

const TokenLists* Sequence::ShallowerLists(uint32_t layer, uint32_t length) const {
  while (layer-- > 0) {
    const Layer& state = layers_[layer];
    if (state.lists != nullptr && state.lists_length == length) return state.lists.get();
  }
  return nullptr;
}

void Sequence::DropLists(uint32_t layer) {
  Layer& state = layers_[layer];
  list_bytes_ -= state.list_bytes;
  state.lists.reset();
  state.lists_length = 0;
  state.list_bytes = 0;
}

void Sequence::DropLists() {
  for (uint32_t layer = 0; layer < shape_->layer_count; ++layer) DropLists(layer);
}

}  // namespace kvservice
