// Adds up the weights that a scan left, over sets of tokens. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_CPU_WEIGHT_SUMS_H_
#define KVSERVICE_ATTENTION_CPU_WEIGHT_SUMS_H_

#include <algorithm>
#include <bit>
#include <cstdint>

#include "absl/types/span.h"
#include "attention/cpu/exp.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/log_mass.h"

namespace kvservice {

// 2^exponent, for exponents beyond +-1000 that of the nearest within.
inline constexpr int32_t kScaleMin = -1000;
inline double ScaleOf(int32_t exponent) {
  constexpr int32_t kBias = 1023;
  constexpr int32_t kMantissaBits = 52;
  const int32_t clamped = std::clamp(exponent, kScaleMin, -kScaleMin);
  return std::bit_cast<double>(static_cast<uint64_t>(clamped + kBias) << kMantissaBits);
}

// A sum of weights with a power of two of its own: sum * 2^reference.
struct ScaledSum {
  // Adds mass * 2^exponent. What vanishes next to the sum is rounded up with `upward`, else down.
  void Add(double mass, int32_t exponent, bool upward);
  // Natural log, to nearest; kLogZero of an empty sum.
  double Log() const;

  double sum = 0.0;
  int32_t reference = kReferenceMin;
};

// Sums of one head's weights over a set, in units of one power of two.
struct MaskSums {
  ScaledSum weight;
  // Of scans with bounds:
  ScaledSum lower;
  ScaledSum estimate;
};
MaskSums SumMask(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask);

// Sum of one head's estimated weights over a set; `mask` covers the blocks of `weights`. Of a scan
// with bounds, tokens of which nothing is known are left out.
ScaledSum SumEstimates(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask);

// What a set of tokens weighs, of scans with bounds: logs, rounded outward with the error of the
// additions.
struct WeightSums {
  LogMassUpper upper;
  LogMassLower lower;
  double log_estimate = kLogZero;  // as SumEstimates
};
WeightSums SumWeights(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask);
// The same from sums that were added up elsewhere, pages in fp32 by at most 18 additions each and
// pages in double.
WeightSums WeightSumsOf(const MaskSums& sums);
inline LogMassUpper SumUpperWeights(const ScanWeights& weights, uint32_t head,
                                    absl::Span<const uint64_t> mask) {
  return SumWeights(weights, head, mask).upper;
}
inline LogMassLower SumLowerWeights(const ScanWeights& weights, uint32_t head,
                                    absl::Span<const uint64_t> mask) {
  return SumWeights(weights, head, mask).lower;
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_WEIGHT_SUMS_H_
