// The keys and values of one sequence: a block table, a length per layer, and the lists that
// selectors remember per layer.
//
// Invariants. Layer l holds tokens [0, length(l)); a block exists for every token of the longest
// layer. A slice is sealed (its sketch is made) exactly when all its tokens are below its layer's
// length. A block that is shared with another sequence is full in all layers of both, so nobody
// writes it; the last, partial block is never shared. Operations that need memory take it first and
// change nothing if there is too little. Lengths grow when the bytes are there, or wait in a
// PendingWrites, which whoever holds it runs before anything else is done with the sequence.
//
// Belongs to the executor thread. The shape, the pool and the device are borrowed and outlive the
// sequence; the pool's memory is host memory.

#ifndef KVSERVICE_KVSERVICE_CACHE_SEQUENCE_H_
#define KVSERVICE_KVSERVICE_CACHE_SEQUENCE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/kv_layout.h"
#include "attention/kv_view.h"
#include "attention/sketch.h"
#include "kvservice/cache/block_pool.h"

namespace kvservice {

// What all sequences of one model share: where layers lie in a block.
//
//     rows = [layer] slices, sketches = [layer] sketch slices
struct CacheShape {
  CacheShape(const KvLayout& layout_in, uint32_t layer_count_in,
             absl::Span<const SketchTable> tables_in)
      : layout(layout_in),
        layer_count(layer_count_in),
        tables(tables_in),
        slice_bytes(layout.slice_bytes()),
        sketch_bytes(SketchLayout(layout.head_dim).slice_bytes(layout.kv_head_count)) {}

  KvLayout layout;
  uint32_t layer_count;
  // [layer_count][kv_head_count], borrowed.
  absl::Span<const SketchTable> tables;
  size_t slice_bytes;
  size_t sketch_bytes;

  BlockBytes block() const {
    return {.rows = layer_count * slice_bytes, .sketches = layer_count * sketch_bytes};
  }
  size_t block_bytes() const { return block().total(); }
  size_t SliceOffset(uint32_t layer) const { return layer * slice_bytes; }
  size_t SketchOffset(uint32_t layer) const { return layer * sketch_bytes; }
  absl::Span<const SketchTable> TablesOf(uint32_t layer) const {
    return tables.subspan(static_cast<size_t>(layer) * layout.kv_head_count, layout.kv_head_count);
  }
};

enum class AppendOutcome : uint8_t {
  kStored,
  kDuplicate,  // Every token was already there, with equal bytes.
  kGap,        // The position is beyond the layer's length.
  kConflict,   // A token that is already there has other bytes.
  kPoolFull,
};

// The arrays behind a KvView, reused from call to call.
struct ViewArrays {
  std::vector<const std::byte*> slices;
  std::vector<const std::byte*> sketches;
};

// What Append leaves for the device to write and to seal, so that the rows of a call go there
// together. The sources are borrowed until Run; until then nobody may read what is to be written.
class PendingWrites {
 public:
  // Hands everything to the device and is empty again. All writes are of one layout.
  void Run(const KvLayout& layout, Device* device);

 private:
  friend class Sequence;
  // Decoding touches one slice per row; prefill chunks and large batches go to the heap.
  absl::InlinedVector<AppendSlice, 8> appends_;
  absl::InlinedVector<SealSlice, 2> seals_;
};

class Sequence {
 public:
  Sequence(const CacheShape* shape, BlockPool* pool, Device* device, BlockOwner owner);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  uint32_t length(uint32_t layer) const { return layers_[layer].length; }
  // Tokens that every layer has, and that any layer has.
  uint32_t length_min() const;
  uint32_t length_max() const;
  uint32_t block_count() const { return static_cast<uint32_t>(blocks_.size()); }
  BlockOwner owner() const { return owner_; }
  // Another sequence has the block too.
  bool is_shared(uint32_t block) const { return blocks_[block].shared(); }
  bool is_on_host(uint32_t block) const { return blocks_[block].place() == RowPlace::kHost; }
  // Blocks, shared ones counted in full, and lists.
  size_t bytes() const;

  // Stores rows [position, position + count) of one layer and seals the slices that become full.
  // What is already stored is compared, not written. k and v are [count][kv_head_count][head_dim]
  // in the cache dtype; count >= 1 and position + count fits 32 bits.
  AppendOutcome Append(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
                       const std::byte* v);
  // The same, but what is to be written waits in `writes`. They are run first where what is stored
  // has to be compared.
  AppendOutcome Append(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
                       const std::byte* v, PendingWrites* writes);

  // The first `length` tokens of a layer, at most length(layer). A slice that is cut by `length` is
  // shown unsealed. Valid until the sequence or the arrays change.
  KvView View(uint32_t layer, uint32_t length, ViewArrays* arrays) const;
  // The same in arrays of the sequence's own, which grow by what is new: a step of decoding does
  // not visit all blocks. Valid until the sequence changes or shows the layer again.
  KvView View(uint32_t layer, uint32_t length);
  // Moves rows of full blocks to the host, oldest first, or back to the device, newest first, until
  // about `bytes` were moved; false if nothing could be. The first block and the newest, which
  // every step reads, stay on the device. As BlockPool::Move: nobody may be using any sequence.
  bool MoveToHost(size_t bytes);
  bool MoveToDevice(size_t bytes);
  // What they would find. A block whose rows found no place on the device when it was made counts
  // as one that is there.
  size_t movable_bytes() const { return (MovableEnd() - host_end_) * shape_->block().rows; }
  size_t host_bytes() const { return (host_end_ - kHostBegin) * shape_->block().rows; }
  // Moves all, and those back that every step reads.
  bool MoveAllToHost();
  bool MoveStepRowsToDevice();
  // Some of what every step reads is there.
  bool HasStepRowsOn(RowPlace place) const;

  // Copies the 64 rows of one KV head of a full block to the host's `rows`, layout.row_bytes()
  // each.
  void ReadRows(uint32_t layer, uint32_t block, uint32_t kv_head, std::byte* rows) const;

  // The stored form of a slice is its first `token_count` rows, [kv_head][token_count][K | V]
  // [head_dim], and its sketch if it is full. Copies them to the host's memory; `sketch` is not
  // touched unless token_count is kBlockTokens.
  void CopySlice(uint32_t layer, uint32_t block, uint32_t token_count, std::byte* rows,
                 std::byte* sketch) const;
  // Takes blocks for [layer_count] lengths, all or none: false if the pool is full. The sequence is
  // empty before, and its bytes are undefined until PasteSlice has written every slice.
  bool Restore(absl::Span<const uint32_t> lengths);
  void PasteSlice(uint32_t layer, uint32_t block, uint32_t token_count, const std::byte* rows,
                  const std::byte* sketch);

  // The same for `token_count` tokens of consecutive slices, whose rows follow each other; sketches
  // of full ones are made here, as those of appended rows are.
  void PasteRows(uint32_t layer, uint32_t first_block, uint32_t token_count, const std::byte* rows);

  // A sequence with the first `length` tokens of every layer, at most length_min(). Full blocks are
  // shared, the partial one is copied, lists are shared until one side uses them. nullptr if the
  // pool is full.
  std::unique_ptr<Sequence> Fork(uint32_t length) const;

  // Forgets tokens at and above `length`. False if the pool is full, which can only happen where
  // the cut goes through a shared block.
  bool Truncate(uint32_t length);

  // The lists of a layer for a call on its first `length` tokens, made at first use, made anew when
  // anchors_max changes, and without anything about later tokens. Not shared with any other
  // sequence.
  TokenLists* ListsFor(uint32_t layer, uint32_t length, uint32_t anchors_max);
  // Says that a call on `length` tokens has used the lists of `layer`.
  void ListsUsed(uint32_t layer, uint32_t length);
  // Lists of the nearest shallower layer that the latest call on `length` tokens has used, nullptr
  // if there are none.
  const TokenLists* ShallowerLists(uint32_t layer, uint32_t length) const;
  void DropLists(uint32_t layer);
  void DropLists();
  size_t list_bytes() const { return list_bytes_; }

 private:
  struct Layer {
    uint32_t length = 0;
    // Shared by forks until one of them needs to write: copying lists costs more than most forks.
    std::shared_ptr<TokenLists> lists;
    uint32_t anchors_max = 0;
    // Attended length of the latest call that used the lists.
    uint32_t lists_length = 0;
    size_t list_bytes = 0;
    // The view of the latest call; entries below `shown_sealed` show sealed slices and stay right.
    ViewArrays view;
    uint32_t shown_sealed = 0;
    uint64_t revision = 0;  // of the view; 0 = none yet
    // The pool's moves that the view knows of.
    uint64_t moves = 0;
  };
  // Blocks before it hold the sinks.
  static constexpr uint32_t kHostBegin = 1;
  // Newest blocks that are full and stay: what is around the local window.
  static constexpr uint32_t kRecentBlocks = 2;
  // Past the last full block that a step need not read.
  uint32_t MovableEnd() const;
  uint32_t Move(uint32_t first, uint32_t end, RowPlace to);

  std::byte* Slice(uint32_t layer, uint32_t block) const {
    return blocks_[block].rows() + shape_->SliceOffset(layer);
  }
  std::byte* Sketch(uint32_t layer, uint32_t block) const {
    return blocks_[block].sketches() + shape_->SketchOffset(layer);
  }
  bool EqualsStored(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
                    const std::byte* v) const;
  bool Reserve(uint32_t block_count);
  void Show(uint32_t layer, uint32_t length, uint32_t first_block, ViewArrays* arrays) const;
  void Write(uint32_t layer, uint32_t position, uint32_t count, const std::byte* k,
             const std::byte* v, PendingWrites* writes) const;
  void SealFull(uint32_t layer, uint32_t old_length, PendingWrites* writes) const;
  SealSlice SealOf(uint32_t layer, uint32_t block) const;
  // A copy of the first `token_count` tokens of a block in all layers; empty if the pool is full.
  BlockRef CopyBlock(const BlockRef& block, uint32_t token_count) const;
  // Calls `copy(bytes in the block, bytes in the stored form, count)` for each part of a slice.
  template <typename Copy>
  void ForEachPart(uint32_t layer, uint32_t block, uint32_t token_count, Copy copy) const;

  const CacheShape* const shape_;
  BlockPool* const pool_;
  Device* const device_;
  const BlockOwner owner_;

  std::vector<BlockRef> blocks_;
  // [kHostBegin, host_end_) are on the host, unless a sequence that shares them has moved them.
  uint32_t host_end_ = kHostBegin;
  std::vector<Layer> layers_;
  size_t list_bytes_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_SEQUENCE_H_
