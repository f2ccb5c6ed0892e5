// Traces of real attention (tests/eval/trace.py writes them, trace_file.py says what is in them)
// and one layer of a trace in a device's memory, sealed with sketch tables learnt from another
// text.

#ifndef KVSERVICE_TESTS_EVAL_TRACE_H_
#define KVSERVICE_TESTS_EVAL_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/kv_layout.h"
#include "attention/sketch_table.h"

namespace kvservice::eval {

// Shape and positions of a trace file; its layers are read one at a time. Immutable.
struct TraceHeader {
  std::string path;
  std::string name;   // Of the file, without folder and ending.
  std::string model;  // The part of the name before the first '-'.
  KvLayout layout;
  uint32_t token_count = 0;
  float scale = 1.0F;
  std::vector<uint32_t> layers;   // Layer numbers in the model.
  std::vector<uint32_t> judged;   // Positions of the queries that certificates are judged on.
  std::vector<uint32_t> sampled;  // Positions of the queries to learn tables from.

  size_t header_bytes() const;
  size_t layer_bytes() const;
};

// NOT_FOUND, or INVALID_ARGUMENT naming the field that cannot be.
absl::StatusOr<TraceHeader> ReadTraceHeader(const std::string& path);

// One layer as it is in the file.
struct TraceLayer {
  std::vector<std::byte> k;    // [tokens][kv_heads][head_dim] bf16
  std::vector<std::byte> v;    // likewise
  std::vector<float> judged;   // [judged][query_heads][head_dim]
  std::vector<float> sampled;  // [sampled][query_heads][head_dim]
};

// `index` counts the trace's layers. INVALID_ARGUMENT if a number is not finite.
absl::StatusOr<TraceLayer> ReadTraceLayer(const TraceHeader& header, size_t index);

// One table per KV head, from the sampled queries and all full pages of the layer.
std::vector<SketchTable> LearnTables(const TraceHeader& header, const TraceLayer& layer);

// A layer in the memory of a device, which must outlive it.
class CachedLayer {
 public:
  static absl::StatusOr<CachedLayer> Make(Device* device, const TraceHeader& header,
                                          const TraceLayer& layer, std::vector<SketchTable> tables);
  // Builds all sketches again, with other tables.
  void Reseal(std::vector<SketchTable> tables);

  absl::Span<const SketchTable> tables() const { return tables_; }
  // At an earlier length: slices that were not full by then have no sketch. Valid until Reseal.
  KvView View(uint32_t length);
  const std::byte* Row(uint32_t kv_head, uint32_t token) const;

 private:
  CachedLayer(Device* device, const KvLayout& layout, uint32_t token_count)
      : device_(device), layout_(layout), token_count_(token_count) {}

  Device* device_;
  KvLayout layout_;
  uint32_t token_count_;
  std::vector<SketchTable> tables_;
  DeviceMemory slice_memory_;
  DeviceMemory sketch_memory_;
  std::vector<const std::byte*> slices_;
  std::vector<const std::byte*> sketches_;  // All full slices.
  std::vector<const std::byte*> view_sketches_;
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_TRACE_H_
