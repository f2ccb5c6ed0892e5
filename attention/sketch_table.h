// The metric and directions that make sketches tight, per model, layer and KV head. Any valid table
// gives valid bounds; a learnt one gives tight bounds. Immutable after NormalizeSketchTable.
// Source: certificate specification section 1.

#ifndef KVSERVICE_ATTENTION_SKETCH_TABLE_H_
#define KVSERVICE_ATTENTION_SKETCH_TABLE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace kvservice {

// Directions that a sketch projects the residual on: one per 64 channels.
constexpr uint32_t SketchDirections(uint32_t head_dim) {
  return head_dim / 64 == 0 ? 1 : head_dim / 64;
}

struct SketchTable {
  // [head_dim] channel metric, geometric mean 1, within [2^-20, 2^20].
  std::vector<float> metric;
  // [SketchDirections(head_dim)][head_dim], each row of norm at most 1. All zero in the identity
  // table.
  std::vector<float> directions;
  // W = metric * directions (channel-wise), [SketchDirections(head_dim)][head_dim]: what encoding
  // multiplies the residual with.
  std::vector<float> weights;
};

// M = 1, U = 0: always valid, only looser.
SketchTable IdentitySketchTable(uint32_t head_dim);

// Checks shapes and finiteness, normalises the metric to geometric mean 1, clamps it, checks
// ||U_j|| <= 1 and computes weights. INVALID_ARGUMENT names the offending field ("metric",
// "directions").
absl::Status NormalizeSketchTable(uint32_t head_dim, SketchTable* table);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SKETCH_TABLE_H_
