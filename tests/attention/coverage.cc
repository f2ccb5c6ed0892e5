#include "tests/attention/coverage.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "attention/sampled_bound.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kTokens = 4096;
constexpr uint32_t kHeavy = uint32_t{1} << 30;

// The number of tokens at their bound, of kTokens equal ones whose others weigh nothing, that a
// bound just calls impossible when no draw hit one. Such a sample is a miss, and the one with the
// largest probability a population can give it.
uint32_t JustTooMany(uint32_t draws, double eta) {
  SampledBound bound;
  bound.Begin(kTokens, draws);
  for (uint32_t i = 0; i < draws; ++i) bound.Add(1, 0.0);
  return static_cast<uint32_t>(std::ceil(bound.UpperBound(eta).value * (1.0 + 1e-5)));
}

Population OneHeavy(std::string name, double heavy, double light) {
  std::vector<uint32_t> weights(kTokens, 1);
  std::vector<double> exact(kTokens, light);
  weights[1234] = kHeavy;
  exact[1234] = heavy * kHeavy;
  return Population(std::move(name), std::move(weights), std::move(exact));
}

// Half the tokens hold a share of weight so small that a sample rarely meets it, and are at their
// bound; the others weigh nothing.
Population HiddenInLightTokens(uint32_t draws, double eta) {
  const double share = static_cast<double>(JustTooMany(draws, eta)) / kTokens;
  constexpr uint32_t kLight = 1000;
  const auto heavy = static_cast<uint32_t>(std::floor(kLight * (1.0 - share) / share));
  std::vector<uint32_t> weights(kTokens, kLight);
  std::vector<double> exact(kTokens, kLight);
  for (uint32_t i = 0; i < kTokens; i += 2) {
    weights[i] = heavy;
    exact[i] = 0.0;
  }
  return Population("hidden in light tokens", std::move(weights), std::move(exact));
}

Population Geometric() {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> uniform;
  std::vector<uint32_t> weights;
  std::vector<double> exact;
  for (uint32_t i = 0; i < kTokens; ++i) {
    weights.push_back(uint32_t{1} << i % 31);
    exact.push_back(weights.back() * std::pow(uniform(random), 3.0));
  }
  return Population("geometric", std::move(weights), std::move(exact));
}

// The lighter, the closer to its bound.
Population LightAtTheirBound() {
  std::vector<uint32_t> weights;
  std::vector<double> exact;
  for (uint32_t i = 0; i < kTokens; ++i) {
    weights.push_back(1 + i * i / 64);
    exact.push_back(weights.back() * (1.0 - static_cast<double>(i) / kTokens));
  }
  return Population("light at their bound", std::move(weights), std::move(exact));
}

}  // namespace

uint32_t MissesAllowed(uint32_t trials, double eta) {
  constexpr long double kSignificance = 1e-6L;
  const auto n = static_cast<long double>(trials);
  const auto p = static_cast<long double>(eta);
  long double above = 1.0L;  // P(X > k)
  for (uint32_t k = 0; k < trials; ++k) {
    const auto x = static_cast<long double>(k);
    const long double log_probability = std::lgamma(n + 1.0L) - std::lgamma(x + 1.0L) -
                                        std::lgamma(n - x + 1.0L) + x * std::log(p) +
                                        (n - x) * std::log1p(-p);
    above -= std::exp(log_probability);
    if (above <= kSignificance) return k;
  }
  return trials;
}

Population::Population(std::string population_name, std::vector<uint32_t> token_weights,
                       std::vector<double> exact_weights)
    : name(std::move(population_name)),
      weights(std::move(token_weights)),
      exact(std::move(exact_weights)) {
  const size_t pages = (weights.size() + kPageTokens - 1) / kPageTokens;
  weights.resize(pages * kPageTokens, 0);
  exact.resize(pages * kPageTokens, 0.0);
  std::vector<uint64_t> page_sums(pages, 0);
  for (size_t i = 0; i < weights.size(); ++i) {
    page_sums[i / kPageTokens] += weights[i];
    exact_sum += static_cast<long double>(exact[i]);
  }
  sums.Assign(page_sums);
}

absl::Span<const uint32_t> Population::Page(uint32_t page) const {
  return absl::MakeConstSpan(weights).subspan(static_cast<size_t>(page) * kPageTokens, kPageTokens);
}

Population TwoPoint(std::string name, uint32_t count, uint32_t weight, uint32_t ones, double rest) {
  std::vector<double> exact(count, rest * weight);
  std::fill_n(exact.begin(), ones, weight);
  return Population(std::move(name), std::vector<uint32_t>(count, weight), std::move(exact));
}

std::vector<Population> HostilePopulations(uint32_t draws) {
  std::vector<Population> all;
  all.push_back(OneHeavy("one heavy token at its bound", 1.0, 1.0));
  all.push_back(OneHeavy("one heavy token of nothing", 0.0, 1.0));
  all.push_back(OneHeavy("one heavy token, light ones half", 0.3, 0.5));
  all.push_back(TwoPoint("all at their bound", kTokens, 77, kTokens, 0.0));
  all.push_back(TwoPoint("all nothing", kTokens, 77, 0, 0.0));
  all.push_back(TwoPoint("all nothing but one", kTokens, 77, 1, 0.0));
  all.push_back(TwoPoint("all alike", kTokens, 77, 0, 0.4));
  for (const double eta : kEtas) {
    const uint32_t ones = JustTooMany(draws, eta);
    const std::string name = "just too many at eta " + std::to_string(eta);
    all.push_back(TwoPoint(name, kTokens, 1, ones, 0.0));
    all.push_back(TwoPoint(name + ", others .3", kTokens, 1000, ones, 0.3));
  }
  all.push_back(TwoPoint("every fifth", kTokens, 9, kTokens / 5, 0.1));
  all.push_back(HiddenInLightTokens(draws, 1e-2));
  all.push_back(Geometric());
  all.push_back(LightAtTheirBound());
  return all;
}

std::array<std::byte, kDrawKeyBytes> TestKey(uint8_t seed) {
  std::array<std::byte, kDrawKeyBytes> key;
  for (size_t i = 0; i < key.size(); ++i) key[i] = std::byte{static_cast<uint8_t>(seed * 31 + i)};
  return key;
}

}  // namespace kvservice::testing
