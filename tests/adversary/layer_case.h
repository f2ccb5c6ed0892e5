// One attack: keys, values and queries of one layer of one sequence, made to be hard for
// certificates. Plain data that follows from a seed alone; whoever executes it (a device in this
// process, a server) gets the same bytes. Any thread.

#ifndef KVSERVICE_TESTS_ADVERSARY_LAYER_CASE_H_
#define KVSERVICE_TESTS_ADVERSARY_LAYER_CASE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/device.h"
#include "attention/sketch_table.h"

namespace kvservice::adversary {

enum class KeyKind : uint8_t {
  kNormal,            // Channels of different scale and offset; some keys along a query.
  kIdentical,         // Every key the same: estimates are exact but for rounding.
  kConstantPages,     // Every key of a page the same.
  kOpposing,          // Norms near 6e4, half of the channels with the opposite sign.
  kCellCorner,        // Every residual as long as its cell allows, along a query.
  kCellCornerSigned,  // The same, half of the tokens against the query.
  kAlongQuery,        // Residual energy along a query, outside of the table's directions.
  kEqualLogits,       // Keys differ only where queries are zero.
  kSubnormal,         // Below the least normal number of the cache's type.
  kWideLogits,        // Logits spread over hundreds.
  kNeedle,            // One token far back outweighs everything.
  kDuplicates,        // Few distinct keys, each many times.
  kOneChannel,        // All the spread in one channel.
  kZero,              // Every key zero.
  kNotFinite,         // An inf or NaN among the keys.
};
inline constexpr uint32_t kKeyKinds = static_cast<uint32_t>(KeyKind::kNotFinite) + 1;

enum class ValueKind : uint8_t {
  kNormal,
  kEqual,           // Dropping changes nothing.
  kOneHuge,         // One value a million times the others.
  kTinyWhereHeavy,  // Heavy tokens say nothing, light ones decide.
  kHugeWhereLight,
  kOppositeSigns,  // Values of neighbours cancel.
  kZero,
  kSubnormal,
  kNotFinite,  // An inf or NaN among the values.
};
inline constexpr uint32_t kValueKinds = static_cast<uint32_t>(ValueKind::kNotFinite) + 1;

enum class QueryKind : uint8_t { kNormal, kZero, kHuge, kTiny, kOneChannel, kAlternating };
inline constexpr uint32_t kQueryKinds = static_cast<uint32_t>(QueryKind::kAlternating) + 1;

enum class TableKind : uint8_t {
  kIdentity,
  kDirections,  // Metric 1, directions along the queries.
  kLearnt,      // Metric of moderate range, directions along the queries.
  kAcross,      // Directions that have nothing to do with the queries.
  kExtreme,     // Metric over the whole allowed range.
};
inline constexpr uint32_t kTableKinds = static_cast<uint32_t>(TableKind::kExtreme) + 1;

// What a case is like, before any number of it exists.
struct CaseTraits {
  KeyKind keys = KeyKind::kNormal;
  ValueKind values = ValueKind::kNormal;
  QueryKind queries = QueryKind::kNormal;
  TableKind tables = TableKind::kIdentity;
};
const char* Name(KeyKind kind);
const char* Name(ValueKind kind);
const char* Name(QueryKind kind);
const char* Name(TableKind kind);
const char* Name(DType dtype);
std::string Name(const CaseTraits& traits);

struct LayerCase {
  uint64_t seed = 0;
  CaseTraits traits;
  LayerShape shape;
  uint32_t length = 0;
  uint32_t query_count = 1;
  std::vector<SketchTable> tables;  // [kv_head_count]
  // Sets of queries at the same position: lists made for one are reused for another. Each
  // [query_count][query_head_count][head_dim].
  std::vector<std::vector<float>> queries;
  // [length][kv_head_count][head_dim] in the cache's type: what is appended.
  std::vector<std::byte> k, v;

  uint32_t head_count() const { return query_count * shape.layout.query_head_count; }
  uint32_t position() const { return length - query_count; }
  // Index of the first element of one token's key or value.
  size_t ElementIndex(uint32_t kv_head, uint32_t token) const {
    return (static_cast<size_t>(token) * shape.layout.kv_head_count + kv_head) *
           shape.layout.head_dim;
  }
  // Logits and limits are such that a sound and useful certificate is well below 1.
  bool is_tame() const;
};

// Bits of the pseudo-random generator that cases are made from: equal on every platform, unlike the
// distributions of the standard library.
class Chance {
 public:
  explicit Chance(uint64_t seed) : state_(seed) {}

  uint64_t Bits();
  // Uniform in [0, end); the bias of the remainder does not matter here. end > 0.
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(Bits() % end); }
  bool OneIn(uint32_t count) { return Below(count) == 0; }
  // Uniform in [0, 1).
  float Uniform() { return static_cast<float>(Bits() >> 40) * 0x1p-24F; }
  // About normal: the sum of twelve uniform numbers, less six.
  float Normal();

 private:
  uint64_t state_;
};

// Unrelated to the seeds of other indices.
uint64_t SeedOf(uint64_t base, uint64_t index);

// Sizes that a case may have. Every combination of head_dim, dtype and group is within them.
struct CaseLimits {
  // Multiplications that scoring all keys once may cost: query tokens * query heads * length * dim.
  uint64_t products_max = uint64_t{6} << 20;
  uint32_t length_max = 4200;
};

LayerCase GenerateCase(uint64_t seed, const CaseLimits& limits);
// Another of the same shape, so that both may be rows of one call.
LayerCase GenerateLike(uint64_t seed, const CaseLimits& limits, const LayerShape& shape);
// A case of given traits and shape (layout, length, query_count are read from `frame`).
LayerCase GenerateCase(uint64_t seed, const CaseTraits& traits, const LayerCase& frame);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_LAYER_CASE_H_
