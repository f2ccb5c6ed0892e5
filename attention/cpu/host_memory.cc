#include "attention/cpu/host_memory.h"

#include <cstring>

#include "attention/float16.h"
#include "attention/host_lists.h"
#include "attention/log_mass.h"

namespace kvservice {

void HostMemory::Set(const LayerShape& shape, const KvView& view, uint32_t kv_head) {
  shape_ = &shape;
  view_ = view;
  kv_head_ = kv_head;
  layout_ = SketchLayout(shape.layout.head_dim);
}

uint64_t HostMemory::Exact(uint32_t block) const {
  // Blocks are asked for in order, and their masks lie too far apart for the processor to see it.
  constexpr uint32_t kAhead = 16;
  if (block + kAhead < view_.sketches.size() && view_.sketches[block + kAhead] != nullptr) {
    __builtin_prefetch(Page(block + kAhead) + layout_.exact);
  }
  uint64_t exact;
  std::memcpy(&exact, Page(block) + layout_.exact, sizeof(exact));
  return exact;
}

float HostMemory::ValueNormMax(uint32_t block) const {
  return SketchPage(layout_, Page(block)).vmax;
}

ValueNorms HostMemory::BoundValueNorms(absl::Span<const uint64_t> tokens,
                                       uint32_t block_begin) const {
  return kvservice::BoundValueNorms(*shape_, view_, kv_head_, tokens, block_begin);
}

void HostMemory::BoundValues(uint32_t block, float* bounds) const {
  const SketchPage page(layout_, Page(block));
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    // The product of two floats is exact in double.
    const double norm =
        static_cast<double>(page.vmax) * static_cast<double>(kRadiusScale[page.vn[t]]);
    bounds[t] = RoundUpToFloat(norm);
  }
}

void HostMemory::Score(const ScoreTask& task, kvservice::Score* scores, float* values) const {
  ScoreTokens(task, scores);
  if (values == nullptr) return;
  const KvLayout& layout = shape_->layout;
  for (const uint32_t position : task.positions) {
    const std::byte* v = view_.Row(layout, kv_head_, position) + layout.vector_bytes();
    for (uint32_t c = 0; c < layout.head_dim; ++c) *values++ = LoadElement(layout.dtype, v, c);
  }
}

std::vector<const std::byte*> HostMemory::Boxes(absl::Span<const uint32_t> blocks,
                                                std::vector<std::byte>* /*storage*/) const {
  std::vector<const std::byte*> pages;
  pages.reserve(blocks.size());
  for (const uint32_t block : blocks) pages.push_back(Page(block));
  return pages;
}

std::vector<const std::byte*> HostMemory::Keys(absl::Span<const uint32_t> positions,
                                               std::vector<std::byte>* /*storage*/) const {
  std::vector<const std::byte*> keys;
  keys.reserve(positions.size());
  for (const uint32_t position : positions) {
    keys.push_back(view_.Row(shape_->layout, kv_head_, position));
  }
  return keys;
}

float HostMemory::KeyNormMax(uint32_t begin, uint32_t end) const {
  return kvservice::KeyNormMax(shape_->layout, view_, kv_head_, begin, end);
}

}  // namespace kvservice
