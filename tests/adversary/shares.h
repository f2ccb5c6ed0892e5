// What was attacked, and how: certificates by the kind of cache they speak of and of plan they
// answer. A campaign that is made faster must not have become an easier one. Plain data; one thread
// at a time.

#ifndef KVSERVICE_TESTS_ADVERSARY_SHARES_H_
#define KVSERVICE_TESTS_ADVERSARY_SHARES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "attention/plan.h"
#include "tests/adversary/layer_case.h"

namespace kvservice::adversary {

// What certificates are sorted by.
enum class Axis : uint8_t {
  kKeys,
  kValues,
  kQueries,
  kTables,
  kDType,
  kHeadDim,
  kGroup,
  kQueryTokens,
  kLength,
  kWindow,
  kSoftcap,
  kSource,
  kGuarantee,
  kLimits,
  kOnViolation,
  kMode,
};
inline constexpr size_t kAxes = static_cast<size_t>(Axis::kMode) + 1;
const char* Name(Axis axis);

class Shares {
 public:
  static constexpr size_t kKindsMax = 16;

  void Count(const LayerCase& layer_case, const Plan& plan, uint64_t certificates);
  void Add(const Shares& other);
  uint64_t Of(Axis axis, size_t kind) const { return counts_[static_cast<size_t>(axis)][kind]; }
  // Of a kind that Of may be asked for.
  static std::string KindName(Axis axis, size_t kind);

 private:
  std::array<std::array<uint64_t, kKindsMax>, kAxes> counts_{};
};

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_SHARES_H_
