// The metric and directions that make sketches tight, per model, layer and KV head. Any valid table
// gives valid bounds; a learnt one gives tight bounds (attention/sketch_learning.h). Immutable
// after NormalizeSketchTable. Source: certificate specification section 1.

#ifndef KVSERVICE_ATTENTION_SKETCH_TABLE_H_
#define KVSERVICE_ATTENTION_SKETCH_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace kvservice {

// Directions that a sketch projects the residual on: one per 64 channels.
constexpr uint32_t SketchDirections(uint32_t head_dim) {
  return head_dim / 64 == 0 ? 1 : head_dim / 64;
}

struct SketchTable {
  // [head_dim] channel metric, geometric mean 1 unless that was clamped, within [2^-20, 2^20].
  std::vector<float> metric;
  // [SketchDirections(head_dim)][head_dim], each row of norm at most 1. All zero in the identity
  // table.
  std::vector<float> directions;
  // W = metric * directions (channel-wise), [SketchDirections(head_dim)][head_dim]: what encoding
  // multiplies the residual with.
  std::vector<float> weights;

  friend bool operator==(const SketchTable&, const SketchTable&) = default;
};

// M = 1, U = 0: always valid, only looser.
SketchTable IdentitySketchTable(uint32_t head_dim);

// Checks shapes and finiteness, normalises the metric to geometric mean 1, clamps it, checks
// ||U_j|| <= 1 and computes weights. INVALID_ARGUMENT names the offending field ("metric",
// "directions").
absl::Status NormalizeSketchTable(uint32_t head_dim, SketchTable* table);

// ---- Stored form ----
// The tables of a model, in the order of the caller (layer, then KV head), little endian:
//
//   magic "KVSKTAB\0", version u32, head_dim u32, table_count u32, reserved u32 (zero)
//   per table: metric f32[d], directions f32[nd][d]
//
// Equal tables have equal bytes, so a digest of the bytes names the tables.

inline constexpr uint32_t kSketchTableVersion = 1;

// Every table must have been normalised for head_dim.
std::vector<std::byte> EncodeSketchTables(uint32_t head_dim, absl::Span<const SketchTable> tables);

// What EncodeSketchTables was given, bit for bit: encoding the result gives the same bytes.
// INVALID_ARGUMENT names the field that is damaged or not of this head_dim: "magic", "version",
// "head_dim", "table_count" (it must match the length), "reserved", "tables[i].metric" (out of
// [2^-20, 2^20]) or "tables[i].directions" (norm above 1). Damage that leaves valid numbers cannot
// be seen here and never makes a bound wrong by itself, but sketches must be scanned with the table
// they were made with: compare the digest.
absl::StatusOr<std::vector<SketchTable>> DecodeSketchTables(uint32_t head_dim,
                                                            absl::Span<const std::byte> bytes);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SKETCH_TABLE_H_
