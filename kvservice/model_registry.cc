#include "kvservice/model_registry.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

std::vector<LayerShape> LayerShapes(const ModelSpec& spec) {
  std::vector<LayerShape> layers(spec.layer_count);
  for (uint32_t layer = 0; layer < spec.layer_count; ++layer) {
    layers[layer] = {
        .layout = spec.layout,
        .scale = spec.scale,
        .logit_softcap = spec.logit_softcap,
        .sliding_window = spec.sliding_windows.empty() ? 0 : spec.sliding_windows[layer],
        .inverse_frequencies = spec.inverse_frequencies,
        .rotary_style = spec.rotary_style,
    };
  }
  return layers;
}

bool AreIdentity(const ModelSpec& spec) {
  const SketchTable identity = IdentitySketchTable(spec.layout.head_dim);
  return std::all_of(spec.sketch_tables.begin(), spec.sketch_tables.end(),
                     [&](const SketchTable& table) { return table == identity; });
}

absl::Status NameTaken(const std::string& name) {
  return MakeError(absl::StatusCode::kAlreadyExists,
                   absl::StrCat("model '", name, "' is registered with another specification"),
                   {.reason = "MODEL_EXISTS", .field = "model.name", .metadata = {{"name", name}}});
}

absl::Status Full(uint32_t models_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("there are ", models_max, " models, the most this server takes"),
                   {.reason = "MODELS_FULL",
                    .field = "",
                    .metadata = {{"models_max", absl::StrCat(models_max)}}});
}

absl::Status TooLarge(size_t block_bytes, size_t block_bytes_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("one block of this model takes ", block_bytes,
                                " bytes, the whole pool has ", block_bytes_max),
                   {.reason = "MODEL_TOO_LARGE",
                    .field = "model",
                    .metadata = {{"block_bytes", absl::StrCat(block_bytes)},
                                 {"pool_bytes", absl::StrCat(block_bytes_max)}}});
}

}  // namespace

Model::Model(ModelSpec spec_in)
    : spec(std::move(spec_in)),
      fingerprint(ModelFingerprint(spec)),
      tables(std::make_unique<TableVersions>(spec.layout, spec.layer_count, spec.sketch_tables)),
      learns_tables(AreIdentity(spec)),
      layers(LayerShapes(spec)) {}

absl::StatusOr<uint64_t> ModelRegistry::Register(ModelSpec spec) {
  const absl::Status status = ValidateModel(&spec);
  if (!status.ok()) return status;
  auto model = std::make_unique<const Model>(std::move(spec));
  const size_t block_bytes = model->tables->latest()->shape.block_bytes();
  if (block_bytes > block_bytes_max_) return TooLarge(block_bytes, block_bytes_max_);
  const uint64_t fingerprint = model->fingerprint;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = models_.find(model->spec.name);
  if (known != models_.end()) {
    const bool same = known->second->fingerprint == fingerprint &&
                      known->second->spec.default_policy == model->spec.default_policy;
    if (!same) return NameTaken(model->spec.name);
    return fingerprint;
  }
  if (models_.size() >= models_max_) return Full(models_max_);
  std::string name = model->spec.name;
  models_.emplace(std::move(name), std::move(model));
  return fingerprint;
}

const Model* ModelRegistry::Find(std::string_view name) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = models_.find(name);
  return known == models_.end() ? nullptr : known->second.get();
}

std::vector<ModelSpec> ModelRegistry::List() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<ModelSpec> specs;
  specs.reserve(models_.size());
  for (const auto& [name, model] : models_) specs.push_back(model->spec);
  return specs;
}

std::vector<ModelShape> ModelRegistry::Shapes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<ModelShape> shapes;
  shapes.reserve(models_.size());
  for (const auto& [name, model] : models_) {
    const Policy& policy = model->spec.default_policy;
    shapes.push_back({.layer_count = model->spec.layer_count,
                      .layout = model->spec.layout,
                      .selector = policy.selector,
                      .guarantee = policy.guarantee,
                      .max_dropped_mass = policy.max_dropped_mass});
  }
  return shapes;
}

uint32_t ModelRegistry::count() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint32_t>(models_.size());
}

}  // namespace kvservice
