// What a group reads of sketches and tokens beside what kernels hand it. Sketches and rows of a
// device need not lie where the host can read them, so a group asks for them here.
//
// One KV head of one row per object; calls of different objects may run in parallel. Blocks are
// absolute indices.

#ifndef KVSERVICE_ATTENTION_CPU_GROUP_MEMORY_H_
#define KVSERVICE_ATTENTION_CPU_GROUP_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/score_kernel.h"
#include "attention/kv_layout.h"

namespace kvservice {

class GroupMemory {
 public:
  virtual ~GroupMemory() = default;
  // Tokens that the sketch of a sealed block marks `exact`, and the largest norm of its values
  // (SketchPage::vmax).
  virtual uint64_t Exact(uint32_t block) const = 0;
  virtual float ValueNormMax(uint32_t block) const = 0;
  // Bounds of the largest norm of the values that no sketch bounds: `tokens` are those of unsealed
  // blocks and those that sketches mark `exact`, as far as the row sees them. Bit t of word b
  // stands for position (block_begin + b) * 64 + t.
  virtual ValueNorms BoundValueNorms(absl::Span<const uint64_t> tokens,
                                     uint32_t block_begin) const = 0;
  // At least the norm of every value of a sealed block, [64].
  virtual void BoundValues(uint32_t block, float* bounds) const = 0;
  // As ScoreTokens; with values not null also V, [positions][head_dim].
  virtual void Score(const ScoreTask& task, Score* scores, float* values) const = 0;
  // Sketch pages of sealed blocks, to be read from SketchLayout::lo on: codes may be missing. Where
  // the host can read them itself they are those of the cache, elsewhere copies in `storage`.
  virtual std::vector<const std::byte*> Boxes(absl::Span<const uint32_t> blocks,
                                              std::vector<std::byte>* storage) const = 0;
  // Likewise K of tokens, [head_dim] in the cache dtype each.
  virtual std::vector<const std::byte*> Keys(absl::Span<const uint32_t> positions,
                                             std::vector<std::byte>* storage) const = 0;
  // At least the largest norm of the keys in [begin, end).
  virtual float KeyNormMax(uint32_t begin, uint32_t end) const = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_GROUP_MEMORY_H_
