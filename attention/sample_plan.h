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

// What samples cost beside the vectors that they read, in vectors: what could be read in that time.
struct SampleCosts {
  double population = 0.0;  // going through the weights of what is dropped, for one head
  double draw = 0.0;        // drawing a token and finding its row, which nothing fetched ahead
};

// Of drawing from `tokens` tokens whose vectors have so many bytes. Measured on a CPU (AVX-512, one
// thread): a nanosecond per token and head and twenty per draw, in which ten bytes each are read.
inline SampleCosts SampleCostsOf(uint32_t tokens, uint32_t vector_bytes) {
  constexpr double kBytesPerToken = 10.0;
  constexpr double kBytesPerDraw = 200.0;
  return {.population = kBytesPerToken * tokens / vector_bytes,
          .draw = kBytesPerDraw / vector_bytes};
}

// Reading `tokens` keys and values, and sampling `draws` keys for each of `heads` heads, or keys
// with values, in vectors.
inline double PlannedVectors(const SampleCosts& costs, uint32_t tokens, uint32_t heads,
                             uint32_t draws, bool with_values = false) {
  const double read = 2.0 * tokens;
  if (draws == 0) return read;
  const double per_draw = (with_values ? 2.0 : 1.0) + costs.draw;
  return read + heads * (costs.population + per_draw * draws);
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
