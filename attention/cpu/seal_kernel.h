// Encodes sketch pages on the best instruction set of the machine: the same code, and the same
// bytes, as EncodeSketchPage.

#ifndef KVSERVICE_ATTENTION_CPU_SEAL_KERNEL_H_
#define KVSERVICE_ATTENTION_CPU_SEAL_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "attention/kv_layout.h"
#include "attention/sketch_table.h"

namespace kvservice {

// As EncodeSketchPage. Any thread.
void SealPage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
              const SketchTable& table, std::byte* page);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_SEAL_KERNEL_H_
