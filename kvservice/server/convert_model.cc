#include <algorithm>
#include <optional>

#include "kvservice/error.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"

namespace kvservice {
namespace {

constexpr char kReason[] = "MODEL_INVALID";

absl::Status Invalid(const std::string& field, const std::string& problem) {
  return InvalidField(field, kReason, field + " " + problem);
}

std::optional<RotaryStyle> RotaryFromProto(v1::RotaryStyle style) {
  switch (style) {
    case v1::ROTARY_STYLE_UNSPECIFIED:
    case v1::ROTARY_STYLE_NONE:
      return RotaryStyle::kNone;
    case v1::ROTARY_STYLE_HALF:
      return RotaryStyle::kHalf;
    case v1::ROTARY_STYLE_INTERLEAVED:
      return RotaryStyle::kInterleaved;
    default:
      return std::nullopt;
  }
}

v1::RotaryStyle RotaryToProto(RotaryStyle style) {
  switch (style) {
    case RotaryStyle::kNone:
      return v1::ROTARY_STYLE_NONE;
    case RotaryStyle::kHalf:
      return v1::ROTARY_STYLE_HALF;
    case RotaryStyle::kInterleaved:
      return v1::ROTARY_STYLE_INTERLEAVED;
  }
  return v1::ROTARY_STYLE_UNSPECIFIED;
}

// Elements of one table's metric and directions.
struct TableSize {
  size_t metric = 0;
  size_t directions = 0;
};

TableSize SizeOf(uint32_t head_dim) {
  return {head_dim, static_cast<size_t>(SketchDirections(head_dim)) * head_dim};
}

// The message itself bounds the work: its arrays must have exactly the sizes that the geometry
// says.
absl::Status TablesFromProto(const v1::SketchTables& from, ModelSpec* spec) {
  const TableSize size = SizeOf(spec->layout.head_dim);
  const std::string field = "model.sketch_tables";
  size_t table_count = 0;
  size_t metric_count = 0;
  size_t direction_count = 0;
  if (size.metric == 0 ||
      __builtin_mul_overflow(size_t{spec->layer_count}, size_t{spec->layout.kv_head_count},
                             &table_count) ||
      __builtin_mul_overflow(table_count, size.metric, &metric_count) ||
      __builtin_mul_overflow(table_count, size.directions, &direction_count)) {
    return Invalid(field, "cannot match the model's geometry");
  }
  if (static_cast<size_t>(from.metric_size()) != metric_count) {
    return Invalid(field + ".metric", "has " + std::to_string(from.metric_size()) +
                                          " numbers, expected " + std::to_string(metric_count));
  }
  if (static_cast<size_t>(from.directions_size()) != direction_count) {
    return Invalid(field + ".directions", "has " + std::to_string(from.directions_size()) +
                                              " numbers, expected " +
                                              std::to_string(direction_count));
  }
  spec->sketch_tables.resize(table_count);
  const float* metric = from.metric().data();
  const float* directions = from.directions().data();
  for (SketchTable& table : spec->sketch_tables) {
    table.metric.assign(metric, metric + size.metric);
    table.directions.assign(directions, directions + size.directions);
    metric += size.metric;
    directions += size.directions;
  }
  return absl::OkStatus();
}

bool IsIdentity(const SketchTable& table) {
  return std::all_of(table.metric.begin(), table.metric.end(), [](float m) { return m == 1.0F; }) &&
         std::all_of(table.directions.begin(), table.directions.end(),
                     [](float u) { return u == 0.0F; });
}

void TablesToProto(const std::vector<SketchTable>& tables, v1::Model* model) {
  if (std::all_of(tables.begin(), tables.end(), IsIdentity)) return;
  v1::SketchTables* to = model->mutable_sketch_tables();
  for (const SketchTable& table : tables) {
    to->mutable_metric()->Add(table.metric.begin(), table.metric.end());
    to->mutable_directions()->Add(table.directions.begin(), table.directions.end());
  }
}

}  // namespace

absl::StatusOr<ModelSpec> ModelFromProto(const v1::Model& model, const PolicyRegistry& registry) {
  ModelSpec spec;
  spec.name = model.name();
  spec.layer_count = model.layer_count();
  spec.layout.query_head_count = model.query_head_count();
  spec.layout.kv_head_count = model.kv_head_count();
  spec.layout.head_dim = model.head_dim();
  const std::optional<DType> dtype = DTypeFromProto(model.cache_dtype());
  if (!dtype.has_value()) return UnknownDTypeError("model.cache_dtype", model.cache_dtype());
  spec.layout.dtype = *dtype;
  spec.scale = model.scale();
  spec.logit_softcap = model.logit_softcap();
  spec.sliding_windows.assign(model.sliding_window_tokens().begin(),
                              model.sliding_window_tokens().end());
  const std::optional<RotaryStyle> rotary = RotaryFromProto(model.rotary_style());
  if (!rotary.has_value()) {
    return Invalid("model.rotary_style",
                   "has the unknown value " + std::to_string(model.rotary_style()));
  }
  spec.rotary_style = *rotary;
  spec.inverse_frequencies.assign(model.inverse_frequencies().begin(),
                                  model.inverse_frequencies().end());
  if (model.has_sketch_tables()) {
    const absl::Status status = TablesFromProto(model.sketch_tables(), &spec);
    if (!status.ok()) return status;
  }
  absl::StatusOr<Policy> policy =
      PolicyFromProto(model.default_policy(), "model.default_policy", registry);
  if (!policy.ok()) return policy.status();
  spec.default_policy = *std::move(policy);
  return spec;
}

void ModelToProto(const ModelSpec& spec, bool with_sketch_tables, v1::Model* model) {
  model->set_name(spec.name);
  model->set_layer_count(spec.layer_count);
  model->set_query_head_count(spec.layout.query_head_count);
  model->set_kv_head_count(spec.layout.kv_head_count);
  model->set_head_dim(spec.layout.head_dim);
  model->set_cache_dtype(DTypeToProto(spec.layout.dtype));
  model->set_scale(spec.scale);
  model->set_logit_softcap(spec.logit_softcap);
  model->mutable_sliding_window_tokens()->Add(spec.sliding_windows.begin(),
                                              spec.sliding_windows.end());
  model->set_rotary_style(RotaryToProto(spec.rotary_style));
  model->mutable_inverse_frequencies()->Add(spec.inverse_frequencies.begin(),
                                            spec.inverse_frequencies.end());
  if (with_sketch_tables) TablesToProto(spec.sketch_tables, model);
  *model->mutable_default_policy() = PolicyToProto(spec.default_policy);
}

}  // namespace kvservice
