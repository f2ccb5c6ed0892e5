// How many tokens to read and how many to sample, before either is done (certificate specification
// section 3, step 2). Only costs depend on these numbers, never a bound. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_SAMPLE_PLAN_H_
#define KVSERVICE_ATTENTION_SAMPLE_PLAN_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace kvservice {

// Share of a limit that a plan aims at; the rest is for the difference between the estimated and
// the measured normaliser.
inline constexpr double kPlannedShare = 0.93;

// Numbers of draws per head that a plan considers.
inline constexpr std::array<uint32_t, 7> kDrawOptions = {0, 32, 64, 128, 256, 512, 1024};

// What a sample of so many keys leaves of the gap between the sum of the upper ends U of dropped
// weights and their sum E: the bound is about E + c (U - E).
inline double SampleFactor(double eta, uint32_t draws) {
  if (draws == 0 || !(eta > 0.0)) return 1.0;
  return std::min(1.0, 1.15 * std::log(4.0 / eta) / draws);
}

// Bytes of reading `tokens` keys and values, and of sampling `keys` keys and `rows` keys with
// values, in elements of one vector.
inline double PlannedVectors(uint32_t tokens, uint64_t keys, uint64_t rows) {
  return 2.0 * tokens + static_cast<double>(keys) + 2.0 * static_cast<double>(rows);
}

// What may be dropped if compensation with so many draws is to prove an output error of `limit`
// largest norms: (1 - factor) E + factor U of the dropped shares must be at most `share`.
struct CompensationPlan {
  double factor = 1.0;
  double share = 0.0;
};

// The radius of the vector mean (output_error.h) is about E sqrt(2 L s / m) + U L / (3 m) norms:
// the draws' mean square is (E / U)^2 s, their largest norm 1. Measured on real traces s is about
// 0.35, and the norms, the error of Z_D included, 1.25. Without draws all that is dropped counts.
inline CompensationPlan PlanCompensation(double limit, double eta, uint32_t draws) {
  constexpr double kNorms = 1.25;
  constexpr double kSquares = 0.35;
  const CompensationPlan without{.factor = 1.0, .share = limit / kNorms};
  if (draws == 0 || !(eta > 0.0)) return without;
  const double logs = std::log(2.7 / eta);
  const double of_estimates = kNorms * std::sqrt(2.0 * logs * kSquares / draws);
  const double of_uppers = kNorms * logs / (3.0 * draws);
  return {.factor = of_uppers / (of_estimates + of_uppers),
          .share = limit / (of_estimates + of_uppers)};
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SAMPLE_PLAN_H_
