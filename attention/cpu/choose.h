// Chooses tokens by the weights of a scan, and adds up the weights of sets. No sorting: scores are
// cut to 16 bits (128 steps per octave) and the threshold is found by bisection over them, in
// vectors.

#ifndef KVSERVICE_ATTENTION_CPU_CHOOSE_H_
#define KVSERVICE_ATTENTION_CPU_CHOOSE_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/exp.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/token_mask.h"
#include "attention/log_mass.h"
#include "attention/plan.h"

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

// Sum of one head's estimated weights over a set; `mask` covers the blocks of `weights`. Of a scan
// with bounds, tokens of which nothing is known are left out.
ScaledSum SumEstimates(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask);
// Logs of sums of upper and lower ends, rounded outward with the error of the additions; of scans
// with bounds.
LogMassUpper SumUpperWeights(const ScanWeights& weights, uint32_t head,
                             absl::Span<const uint64_t> mask);
LogMassLower SumLowerWeights(const ScanWeights& weights, uint32_t head,
                             absl::Span<const uint64_t> mask);

struct ChooseTask {
  const ScanWeights* weights = nullptr;
  // All masks cover the blocks of `weights`.
  absl::Span<const uint64_t> candidates;  // what may be chosen
  absl::Span<const uint64_t> pool;        // scanned tokens that enter the normaliser
  absl::Span<const uint64_t> unread;      // dropped whatever is chosen; counts when proving
  absl::Span<const double> always_lse;    // [head_count], exact mass of what is always read
  // Scores and limits use the upper ends of the weights (of a scan with bounds), else estimates.
  bool proving = false;
  uint32_t top_k = 0;       // at least this many candidates, if there are
  float mass_limit = 0.0F;  // what no head may leave unchosen more than; 0 = off
  uint32_t dilate_strongest = 0;
  uint32_t dilate_radius = 0;
};

// Memory of one thread for Choose; grows to the longest row it has seen.
struct ChooseScratch {
  std::vector<int16_t> scores;  // [blocks][64]
  std::vector<float> shares;    // [head_count][blocks][64]
  std::vector<float> factors;   // [head_count][blocks]
};

// The chosen candidates. A token's score is its largest share of attention in any head where a
// limit on every head counts (proving, or by mass), else the sum of its shares; among equal scores
// the lower position goes first.
TokenMask Choose(const ChooseTask& task, ChooseScratch* scratch);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_CHOOSE_H_
