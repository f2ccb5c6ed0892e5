// The models that a server knows. Models are never forgotten, so a pointer to one stays valid as
// long as the registry.
//
// Thread-safe.

#ifndef KVSERVICE_KVSERVICE_MODEL_REGISTRY_H_
#define KVSERVICE_KVSERVICE_MODEL_REGISTRY_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/model.h"
#include "kvservice/table_versions.h"

namespace kvservice {

// A registered model with what calls need of it. Immutable but for its versions of sketch tables.
struct Model {
  explicit Model(ModelSpec spec_in);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelSpec spec;
  const uint64_t fingerprint;
  const std::unique_ptr<TableVersions> tables;
  // It was registered without tables: the service may learn some.
  const bool learns_tables;
  // [layer_count], borrowing from spec.
  std::vector<LayerShape> layers;
};

class ModelRegistry {
 public:
  // block_bytes_max: the pool; a model of which not one block fits is refused.
  ModelRegistry(uint32_t models_max, size_t block_bytes_max)
      : models_max_(models_max), block_bytes_max_(block_bytes_max) {}

  // The model's fingerprint. INVALID_ARGUMENT / MODEL_INVALID, ALREADY_EXISTS / MODEL_EXISTS if the
  // name stands for something else, RESOURCE_EXHAUSTED / MODELS_FULL or MODEL_TOO_LARGE.
  absl::StatusOr<uint64_t> Register(ModelSpec spec);
  // nullptr if there is no such model.
  const Model* Find(std::string_view name) const;
  // By name.
  std::vector<ModelSpec> List() const;
  // By name, without the tables, which are large.
  std::vector<ModelShape> Shapes() const;
  uint32_t count() const;

 private:
  const uint32_t models_max_;
  const size_t block_bytes_max_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::string, std::unique_ptr<const Model>, std::less<>> models_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_MODEL_REGISTRY_H_
