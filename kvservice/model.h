// What the service knows of a model: the geometry of its attention, never its weights. Plain data,
// immutable once registered.

#ifndef KVSERVICE_KVSERVICE_MODEL_H_
#define KVSERVICE_KVSERVICE_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "attention/device.h"
#include "attention/sketch_table.h"
#include "selector/policy.h"

namespace kvservice {

// Limits of a registration; a request beyond them is INVALID_ARGUMENT.
inline constexpr uint32_t kLayersMax = 256;
inline constexpr uint32_t kKvHeadsMax = 128;
inline constexpr uint32_t kModelNameBytesMax = 128;

struct ModelSpec {
  std::string name;
  uint32_t layer_count = 0;
  KvLayout layout;
  float scale = 0.0F;
  float logit_softcap = 0.0F;
  // [layer_count], 0 = full attention. Empty = all full.
  std::vector<uint32_t> sliding_windows;
  std::vector<float> inverse_frequencies;
  RotaryStyle rotary_style = RotaryStyle::kNone;
  // [layer_count * kv_head_count] in layer-major order. Empty = identity tables.
  std::vector<SketchTable> sketch_tables;
  Policy default_policy;
};

// A model without its name, which is its tenants' own: what operators may know.
struct ModelShape {
  uint32_t layer_count = 0;
  KvLayout layout;
  // Of the default policy.
  SelectorKind selector = SelectorKind::kAuto;
  Guarantee guarantee = Guarantee::kNone;
  float max_dropped_mass = 1.0F;
};

// Checks every field and normalises the sketch tables (fills identity tables where there are none).
// INVALID_ARGUMENT names the field as the proto spells it ("model.head_dim").
absl::Status ValidateModel(ModelSpec* spec);

// A digest (SHA-256, first 8 bytes) of everything that changes cached bytes or their meaning; equal
// specs have equal fingerprints.
uint64_t ModelFingerprint(const ModelSpec& spec);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_MODEL_H_
