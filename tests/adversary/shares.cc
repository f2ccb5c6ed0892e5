#include "tests/adversary/shares.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace kvservice::adversary {
namespace {

constexpr std::array<uint32_t, 5> kDims = {64, 80, 96, 128, 256};
// Tokens of a cache, up to and including.
constexpr std::array<uint32_t, 5> kLengths = {64, 128, 320, 600, 1200};
constexpr std::array<const char*, 4> kLimitNames = {"none", "mass", "output", "both"};

template <size_t kCount>
size_t IndexOf(const std::array<uint32_t, kCount>& ends, uint32_t x) {
  return static_cast<size_t>(std::lower_bound(ends.begin(), ends.end(), x) - ends.begin());
}

template <typename Enum>
size_t Index(Enum x) {
  return static_cast<size_t>(x);
}

size_t LimitsOf(const Plan& plan) {
  return (plan.max_dropped_mass < 1.0F ? 1 : 0) + (std::isfinite(plan.max_output_error) ? 2 : 0);
}

std::string LengthName(size_t kind) {
  if (kind == kLengths.size()) return "more";
  return absl::StrCat("to ", kLengths[kind]);
}

// [axis][kind], where kinds are not numbers; null behind the last.
const char* WordOf(Axis axis, size_t kind) {
  constexpr std::array<const char*, 4> kSources = {"all", "scan", "reuse", "given"};
  constexpr std::array<const char*, 4> kGuarantees = {"none", "confidence", "deterministic",
                                                      "exact"};
  constexpr std::array<const char*, 4> kViolations = {"report", "grow", "dense", "fail"};
  constexpr std::array<const char*, 2> kModes = {"enforce", "shadow"};
  constexpr std::array<const char*, 2> kSwitches = {"no", "yes"};
  if (axis == Axis::kKeys) return Name(static_cast<KeyKind>(kind));
  if (axis == Axis::kValues) return Name(static_cast<ValueKind>(kind));
  if (axis == Axis::kQueries) return Name(static_cast<QueryKind>(kind));
  if (axis == Axis::kTables) return Name(static_cast<TableKind>(kind));
  if (axis == Axis::kDType) return Name(static_cast<DType>(kind));
  if (axis == Axis::kSource) return kSources[kind];
  if (axis == Axis::kGuarantee) return kGuarantees[kind];
  if (axis == Axis::kLimits) return kLimitNames[kind];
  if (axis == Axis::kOnViolation) return kViolations[kind];
  if (axis == Axis::kMode) return kModes[kind];
  return kSwitches[kind];
}

}  // namespace

const char* Name(Axis axis) {
  constexpr std::array<const char*, kAxes> kNames = {
      "keys",      "values",       "queries",      "tables", "dtype",    "head_dim",
      "group",     "query_tokens", "length",       "window", "soft_cap", "source",
      "guarantee", "limits",       "on_violation", "mode"};
  return kNames[Index(axis)];
}

void Shares::Count(const LayerCase& layer_case, const Plan& plan, uint64_t certificates) {
  const LayerShape& shape = layer_case.shape;
  const auto add = [&](Axis axis, size_t kind) {
    counts_[Index(axis)][std::min(kind, kKindsMax - 1)] += certificates;
  };
  add(Axis::kKeys, Index(layer_case.traits.keys));
  add(Axis::kValues, Index(layer_case.traits.values));
  add(Axis::kQueries, Index(layer_case.traits.queries));
  add(Axis::kTables, Index(layer_case.traits.tables));
  add(Axis::kDType, Index(shape.layout.dtype));
  add(Axis::kHeadDim, IndexOf(kDims, shape.layout.head_dim));
  add(Axis::kGroup, shape.layout.group_size() - 1);
  add(Axis::kQueryTokens, layer_case.query_count - 1);
  add(Axis::kLength, IndexOf(kLengths, layer_case.length));
  add(Axis::kWindow, shape.sliding_window > 0 ? 1 : 0);
  add(Axis::kSoftcap, shape.logit_softcap > 0.0F ? 1 : 0);
  add(Axis::kSource, Index(plan.source));
  add(Axis::kGuarantee, Index(plan.prove));
  add(Axis::kLimits, LimitsOf(plan));
  add(Axis::kOnViolation, Index(plan.on_violation));
  add(Axis::kMode, Index(plan.mode));
}

void Shares::Add(const Shares& other) {
  for (size_t axis = 0; axis < kAxes; ++axis) {
    for (size_t kind = 0; kind < kKindsMax; ++kind)
      counts_[axis][kind] += other.counts_[axis][kind];
  }
}

std::string Shares::KindName(Axis axis, size_t kind) {
  if (axis == Axis::kHeadDim) return kind < kDims.size() ? absl::StrCat(kDims[kind]) : "other";
  if (axis == Axis::kGroup || axis == Axis::kQueryTokens) return absl::StrCat(kind + 1);
  if (axis == Axis::kLength) return LengthName(kind);
  return WordOf(axis, kind);
}

}  // namespace kvservice::adversary
