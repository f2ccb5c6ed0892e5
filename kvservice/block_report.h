// What is asked about one block of a sequence, and what is told. Plain data.

#ifndef KVSERVICE_KVSERVICE_BLOCK_REPORT_H_
#define KVSERVICE_KVSERVICE_BLOCK_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "kvservice/cache/checksum.h"

namespace kvservice {

struct BlockAsk {
  uint32_t block = 0;
  // One layer, with attention; absent = all layers without.
  std::optional<uint32_t> layer = {};
};

// Euclidean norms of the keys, or values, of a slice: of every token in every KV head.
struct NormSummary {
  double max = 0.0;
  double mean = 0.0;
};

// One layer of the block.
struct BlockSlice {
  uint32_t layer = 0;
  uint32_t token_count = 0;
  bool is_on_disk = false;
  // Of the stored form: rows, and the sketch if the slice is full.
  Checksum checksum{};
  NormSummary key;
  NormSummary value;
  // [query_head_count], shares of the latest kept query's attention; empty = not known.
  std::vector<double> attention_mass;
};

struct BlockReport {
  uint32_t first_token = 0;
  bool is_shared = false;
  // Its keys and values are in the host's memory (EngineOptions::host_pool_bytes).
  bool is_on_host = false;
  size_t bytes = 0;
  // Of the layers that have tokens of the block, in their order.
  std::vector<BlockSlice> slices;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_BLOCK_REPORT_H_
