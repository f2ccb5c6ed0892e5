// Judging statements that may fail with a known probability: hostile populations of tokens and
// exact binomial acceptance.

#ifndef KVSERVICE_TESTS_ATTENTION_COVERAGE_H_
#define KVSERVICE_TESTS_ATTENTION_COVERAGE_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "attention/draws.h"

namespace kvservice::testing {

// Failure probabilities that coverage is judged at.
inline constexpr std::array<double, 3> kEtas{0.05, 1e-2, 1e-3};

// The acceptance region of `trials` trials is {0 .. MissesAllowed}: the smallest k with
// P(Binomial(trials, eta) > k) <= 1e-6, summed exactly. A statement that keeps its promise is
// rejected with at most that probability, and seeds are fixed.
uint32_t MissesAllowed(uint32_t trials, double eta);

// Tokens with integer weights and exact softmax weights exact[i] <= weights[i].
struct Population {
  Population(std::string population_name, std::vector<uint32_t> token_weights,
             std::vector<double> exact_weights);

  uint64_t weight_sum() const { return sums.total(); }
  absl::Span<const uint32_t> Page(uint32_t page) const;
  double Exact(const WeightedDraws::Token& token) const {
    return exact[token.page * kPageTokens + token.token];
  }

  static constexpr uint32_t kPageTokens = 64;
  std::string name;
  std::vector<uint32_t> weights;  // Padded to whole pages with weight 0.
  std::vector<double> exact;
  PageSums sums;
  long double exact_sum = 0.0L;
};

// `count` tokens of one weight, the first `ones` of which have exact weight = weight, the others
// `rest` of it.
Population TwoPoint(std::string name, uint32_t count, uint32_t weight, uint32_t ones, double rest);

// Populations that are hard for any bound from `draws` draws at the etas above: one heavy token
// among thousands of weight 1, everything at its bound, mass that a sample misses with a
// probability of just about eta, mass hidden in the lightest tokens, and so on.
std::vector<Population> HostilePopulations(uint32_t draws);

// A key for tests; different seeds give unrelated ones.
std::array<std::byte, kDrawKeyBytes> TestKey(uint8_t seed);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_COVERAGE_H_
