// Test data for devices: one layer of one sequence in a device's memory, with keys of a chosen
// kind, its queries, and a call on it with room for the answers. Everything follows from a seed.

#ifndef KVSERVICE_TESTS_ATTENTION_KV_CASE_H_
#define KVSERVICE_TESTS_ATTENTION_KV_CASE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/certificate.h"
#include "attention/device.h"
#include "attention/plan.h"

namespace kvservice::testing {

enum class Keys : uint8_t {
  kNormal,         // Channels of different scale and offset, queries correlated with some keys.
  kIdentical,      // Every key the same.
  kConstantPages,  // Every key of a slice the same.
  kOpposing,       // Norms near 6e4, half of the channels with the opposite sign.
  kCellCorner,     // Every residual as long as its cell allows, along the first query.
  kEqualLogits,    // Keys differ only where queries are zero.
  kSubnormal,      // Numbers below the least normal of the cache type.
  kWideLogits,     // Logits spread over hundreds.
  kNotFinite,      // One slice holds an inf in K, another a NaN in V.
};
inline constexpr Keys kAllKeys[] = {Keys::kNormal,    Keys::kIdentical,  Keys::kConstantPages,
                                    Keys::kOpposing,  Keys::kCellCorner, Keys::kEqualLogits,
                                    Keys::kSubnormal, Keys::kWideLogits, Keys::kNotFinite};
std::string Name(Keys keys);
std::string Name(DType dtype);

enum class Tables : uint8_t {
  kIdentity,
  kDirections,  // Metric 1, directions along the queries.
  kLearnt,      // Metric of moderate range, directions along the queries.
  kExtreme,     // Metric over the whole allowed range.
};

struct CaseOptions {
  KvLayout layout{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};
  uint32_t length = 400;
  uint32_t query_count = 1;
  Keys keys = Keys::kNormal;
  Tables tables = Tables::kIdentity;
  // Every query is zero.
  bool zero_queries = false;
  uint64_t seed = 1;
};

// Owns the memory of the case; the device must outlive it.
class KvCase {
 public:
  KvCase(Device* device, const CaseOptions& options);

  const CaseOptions& options() const { return options_; }
  const LayerShape& shape() const { return shape_; }
  LayerShape* mutable_shape() { return &shape_; }
  Device* device() const { return device_; }
  const std::vector<SketchTable>& tables() const { return tables_; }
  // [query_count][query_head_count][head_dim]
  const std::vector<float>& queries() const { return queries_; }

  // K of a token as stored, in the host's copy of the slices; V follows at + vector_bytes().
  const std::byte* Row(uint32_t kv_head, uint32_t token) const;
  // Overwrites the key of one token before Seal: [head_dim].
  void SetKey(uint32_t kv_head, uint32_t token, const std::vector<float>& key);
  // Seals all full slices again (after SetKey).
  void Seal();
  // True if the sketch says that the token must be read exactly, or there is none at this length.
  bool IsExact(uint32_t kv_head, uint32_t token, uint32_t length) const;
  // The view at an earlier length: slices not full by then have no sketch.
  KvView View(uint32_t length) const;

 private:
  void MakeTables();
  void MakeQueries();
  std::vector<float> MakeVectors();
  void ShapeKeys(std::vector<float>* keys);
  void ShapeKey(uint32_t token, uint32_t kv_head, float* key);
  void SpoilValues(std::vector<float>* keys, std::vector<float>* values) const;
  void Store(const std::vector<float>& keys, const std::vector<float>& values);
  // Makes the host's copies of slices or sketches.
  void ReadBack(const std::vector<DeviceMemory>& memory, size_t bytes,
                std::vector<std::vector<std::byte>>* copies) const;

  CaseOptions options_;
  Device* device_;
  LayerShape shape_;
  std::mt19937_64 random_;
  std::vector<SketchTable> tables_;
  std::vector<float> queries_;
  std::vector<DeviceMemory> slice_memory_;
  std::vector<DeviceMemory> sketch_memory_;
  std::vector<std::vector<std::byte>> host_slices_;
  std::vector<std::vector<std::byte>> host_sketches_;
  std::vector<const std::byte*> slices_;
  std::vector<const std::byte*> sketches_;
  // For every length, the sketches that exist then; made by View and kept alive.
  mutable std::vector<std::unique_ptr<std::vector<const std::byte*>>> views_;
};

// One call on a case. `queries` are the last query_count tokens below `length`.
struct Call {
  Call(const KvCase& kv, uint32_t length, uint32_t query_count, const std::vector<float>& queries,
       const Plan& plan);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void Run(Device* device, const LayerShape& shape);

  std::vector<float> q, out, lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
  std::vector<std::vector<uint32_t>> selected;
  AttendRow row;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_KV_CASE_H_
