// The memory of a group whose sketches and rows the host reads itself.

#ifndef KVSERVICE_ATTENTION_CPU_HOST_MEMORY_H_
#define KVSERVICE_ATTENTION_CPU_HOST_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/group_memory.h"
#include "attention/device.h"
#include "attention/sketch.h"

namespace kvservice {

class HostMemory : public GroupMemory {
 public:
  // Borrows the shape and the row's view until it is set again.
  void Set(const LayerShape& shape, const KvView& view, uint32_t kv_head);

  uint64_t Exact(uint32_t block) const override;
  float ValueNormMax(uint32_t block) const override;
  ValueNorms BoundValueNorms(absl::Span<const uint64_t> tokens,
                             uint32_t block_begin) const override;
  void BoundValues(uint32_t block, float* bounds) const override;
  void Score(const ScoreTask& task, kvservice::Score* scores, float* values) const override;
  std::vector<const std::byte*> Boxes(absl::Span<const uint32_t> blocks,
                                      std::vector<std::byte>* storage) const override;
  std::vector<const std::byte*> Keys(absl::Span<const uint32_t> positions,
                                     std::vector<std::byte>* storage) const override;
  float KeyNormMax(uint32_t begin, uint32_t end) const override;

 private:
  const std::byte* Page(uint32_t block) const {
    return view_.sketches[block] + kv_head_ * layout_.page_bytes;
  }

  const LayerShape* shape_ = nullptr;
  KvView view_;
  uint32_t kv_head_ = 0;
  SketchLayout layout_{64};
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_HOST_MEMORY_H_
