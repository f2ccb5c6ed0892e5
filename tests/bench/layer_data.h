// One layer of one sequence with attention that is peaked as in real models: most mass on a sink
// and on a few hundred tokens, the rest diffuse.

#ifndef KVSERVICE_TESTS_BENCH_LAYER_DATA_H_
#define KVSERVICE_TESTS_BENCH_LAYER_DATA_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "attention/device.h"

namespace kvservice::bench {

struct LayerOptions {
  KvLayout layout;
  uint32_t length = 0;
  // Tokens per KV head that the queries look for; the others' logits are normal with deviation 1.
  uint32_t hot_tokens = 256;
  // How far the hot tokens' logits lie above the mean of the others, in nats.
  float hot_nats = 10.0F;
  uint64_t seed = 1;
};

// Makes tokens and queries of such a layer, in order.
class LayerSource {
 public:
  LayerSource(const LayerOptions& options, float scale);
  // Keys and values of token `token` < options.length: [kv_head_count][head_dim] in the cache type.
  void Token(uint32_t token, std::byte* k, std::byte* v);
  // [query_head_count][head_dim]. Query heads of a group look the same way, each with a deviation
  // of its own, a new one every time.
  std::vector<float> Queries();

 private:
  const LayerOptions options_;
  const float query_norm_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::vector<std::vector<float>> directions_;  // where each KV head's queries look
  std::vector<std::vector<bool>> hot_;          // [kv_head][token]
};

// Owns the memory; the device outlives it.
class LayerData {
 public:
  // Makes, appends and seals. RESOURCE_EXHAUSTED without the memory.
  static absl::Status Make(const LayerOptions& options, Device* device, LayerData* data);

  const LayerShape& shape() const { return shape_; }
  KvView view() const { return {.slices = slices_, .sketches = sketches_, .length = length_}; }
  absl::Span<const SketchTable> tables() const { return tables_; }
  // [query_head_count][head_dim], of the last token.
  const std::vector<float>& queries() const { return queries_; }
  // All slices, contiguous.
  const DeviceMemory& slice_memory() const { return slice_memory_; }
  // What sealing all slices takes, for measuring it.
  const std::vector<SealSlice>& seal_calls() const { return seal_calls_; }

 private:
  uint32_t length_ = 0;
  LayerShape shape_;
  std::vector<SketchTable> tables_;
  std::vector<float> queries_;
  DeviceMemory slice_memory_;
  DeviceMemory sketch_memory_;
  std::vector<const std::byte*> slices_;
  std::vector<const std::byte*> sketches_;
  std::vector<SealSlice> seal_calls_;
};

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_LAYER_DATA_H_
